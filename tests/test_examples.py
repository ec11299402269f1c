"""The worked examples: what stands in docs/examples is run as it stands, with fewer steps, on a few drawn inputs."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from layershare.cli import app
from layershare.measure.latency import latency

compare = sys.modules["layershare.measure.compare"]

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (EXAMPLES / page).read_text(encoding="utf-8"), flags=re.S)


def run(page: str, steps: int = 2) -> list[str]:
    """Run every command of a page, then its Python; returns what the commands said."""
    said = []
    for line in "".join(blocks(f"{page}.md", "bash")).splitlines():
        command = shlex.split(re.sub(r"--steps \d+", f"--steps {steps}", line))
        assert command[0] == "layershare"
        result = CliRunner().invoke(app, command[1:])
        assert result.exit_code == 0, result.output
        said.append(result.output)
    for block in blocks(f"{page}.md", "python"):
        exec(compile(block, page, "exec"), {})
    return said


@pytest.mark.parametrize(
    "page", sorted(path.stem for path in EXAMPLES.glob("*.md") if ".zh" not in path.name)
)
def test_both_languages_show_the_same_commands(page: str):
    for language in ("bash", "python"):
        assert blocks(f"{page}.md", language) == blocks(f"{page}.zh.md", language) != []


def test_image_classification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    from PIL import Image

    draw = np.random.default_rng(0)
    for label in "01":
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(1, 11):
            pixels = draw.integers(128 * int(label), 128 * int(label) + 128, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{number:04}.png")
    monkeypatch.chdir(tmp_path)
    # Speed is not what is tested here: as few timed runs as may be, and no processes for the memory.
    monkeypatch.setattr(compare, "latency", lambda *calls, **how: latency(*calls, **how | {"seconds": 0.0}))
    monkeypatch.setattr(compare, "peak_memory", lambda *_, **__: None)
    said = run("image-classification")
    assert "A A B B" in said[1]
    assert "compute per image" in said[-1]
    assert capsys.readouterr().out.strip()[-1] in "01"
