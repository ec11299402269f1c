"""Every page of docs/examples does what it says: its commands and its code run, one after another, on tiny models.

A page is plain Markdown. ``sh`` blocks hold layershare commands, one a line; ``python`` blocks follow in one session.
What they name and do not make comes from materials.py. Steps are cut, and timed runs; nothing else is changed. The
Chinese page, NAME.zh.md, has the same blocks.
"""

import importlib
import re
import shlex
from functools import partial
from pathlib import Path

import pytest

from layershare import cli
from layershare.tasks import TASKS
from materials import MATERIALS

FOLDER = Path(__file__).parent.parent / "docs" / "examples"
PAGES = sorted(page for page in FOLDER.glob("*.md") if not page.name.endswith(".zh.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMPARE = importlib.import_module("layershare.measure.compare")  # the package has a function of this name
STEPS = re.compile(r"(steps[ =])\d+")


def blocks(page):
    """(language, code) of each block."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    assert found, f"{page.name} has no code"
    assert {language for language, _ in found} <= {"sh", "python"}, page.name
    return found


def quick(latency, calls, *, runs, seconds, **told):
    return latency(calls, runs=1, seconds=0, **told)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_as_it_stands(page, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(COMPARE, "peak_memory", lambda *_, **__: None)  # a process for each model
    monkeypatch.setattr(COMPARE, "latency", partial(quick, COMPARE.latency))
    code = blocks(page)
    for name, make in MATERIALS.items():
        if any(name in block for _, block in code):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path, tokenizer)
    session = {}
    for language, block in code:
        short = STEPS.sub(r"\g<1>2", block)
        if language == "python":
            exec(compile(short, page.name, "exec"), session)
            continue
        for line in short.replace("\\\n", " ").splitlines():
            program, *words = shlex.split(line)
            assert program == "layershare", line
            assert cli.main(words) == 0, f"{line}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_chinese_page_has_the_same_code(page):
    assert blocks(page.with_suffix(".zh.md")) == blocks(page)


def test_every_task_has_a_page():
    told = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in TASKS if name != "span-corruption" and f"--task {name} " not in told] == []


def test_what_pages_link_to_is_there():
    for page in FOLDER.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
