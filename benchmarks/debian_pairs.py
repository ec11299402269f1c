"""Parallel texts and summaries out of the package descriptions that Debian's apt fetches.

    python benchmarks/debian_pairs.py out/debian

writes ``en-de`` and ``en-fr`` (one pair a line: a synopsis or a paragraph in both languages) and ``synopsis`` (a long
description and the synopsis above it), each as train.jsonl, validation.jsonl and test.jsonl, text.txt with all texts
of train.jsonl, and pairs.json with counts and hashes. The lists are fetched by the machine's own apt into
``out/debian/lists``; the system's lists are not touched, and root is not needed. ``--lists FOLDER`` takes lists that
are there (/var/lib/apt/lists has translations where Acquire::Languages names them). Without apt, or where a list is
missing, it says so and writes nothing.

A source package is in one part only, and no text of one part, on either side, is in another. The texts follow the
Debian release, without its updates of the day, so a result belongs with the hashes in pairs.json. Descriptions have the
licences of their packages: use them, do not pass them on.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELPER = "/usr/lib/apt/apt-helper"
PARTS = {"train": 90, "validation": 5, "test": 5}  # per cent of the source packages
DAILY = re.compile(r"_dists_[^_]+-(backports|proposed|security|updates)")
PACKED = re.compile(r"\.(lz4|xz|gz|bz2|zst)$")

Pair = tuple[str, str]


@dataclass(frozen=True)
class Description:
    """``source``: the source package. ``paragraphs``: each in one line."""

    source: str
    synopsis: str
    paragraphs: tuple[str, ...]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--lists", type=Path, help="a folder of apt lists, instead of fetching them")
    parser.add_argument("--languages", default="de,fr", help="default: de,fr")
    parser.add_argument(
        "--most", type=int, default=600, help="leave out pairs with a longer text, in characters"
    )
    asked = parser.parse_args()
    languages = asked.languages.split(",")
    try:
        lists = asked.lists or fetch(asked.out / "lists", ["en", *languages])
        told = build(lists, asked.out, languages, asked.most)
    except RuntimeError as error:
        sys.stderr.write(f"debian_pairs: {error}\n")
        return 2
    print(json.dumps(told, indent=2))
    return 0


def fetch(lists: Path, languages: list[str]) -> Path:
    """Have apt fetch its lists for these languages into a folder of our own. Raises RuntimeError."""
    if shutil.which("apt-get") is None:
        raise RuntimeError(
            "there is no apt-get: this needs Debian or Ubuntu, or --lists with a folder of their lists."
        )
    lists, cache = lists.absolute(), (lists.parent / "cache").absolute()
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    (cache / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    settings = {
        "Dir::State::lists": lists,
        "Dir::Cache": cache,
        "Acquire::Languages": ",".join(languages),
        "APT::Sandbox::User": "",
        "APT::Update::Post-Invoke": "",
        "APT::Update::Post-Invoke-Success": "",
    }
    options = [f"-o{key}={value}" for key, value in settings.items()]
    done = subprocess.run(["apt-get", "update", *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"apt-get update failed: {(done.stderr or done.stdout).strip()[-500:]}")
    return lists


def build(lists: Path, out: Path, languages: list[str], most: int) -> dict:
    """Write all data sets; what is told is also in ``out/pairs.json``."""
    sources = {
        entry["Package"]: entry.get("Source", entry["Package"]).split()[0]
        for file in found(lists, "_Packages")
        for entry in entries(file)
    }
    english = descriptions(lists, "en", sources)
    told: dict = {"lists": {}, "data": {}}
    for language in ("en", *languages):
        for file in found(lists, f"_Translation-{language}"):
            told["lists"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    for language in languages:
        other = descriptions(lists, language, sources)
        both = [(english[key], other[key]) for key in english if key in other]
        rows = [(ours.source, pair) for ours, theirs in both for pair in pairs(ours, theirs, most)]
        names = ("en", language)
        told["data"][f"en-{language}"] = {"descriptions": len(both)} | write(
            out / f"en-{language}", rows, names
        )
    rows = [
        (one.source, (" ".join(one.paragraphs), one.synopsis)) for one in english.values() if one.paragraphs
    ]
    told["data"]["synopsis"] = {"descriptions": len(english)} | write(
        out / "synopsis", rows, ("description", "synopsis")
    )
    (out / "pairs.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return told


def found(lists: Path, ending: str) -> list[Path]:
    """A release's own lists whose name, without a suffix of compression, ends so. RuntimeError when there is none."""
    files = sorted(
        file
        for file in lists.glob(f"*{ending}*")
        if PACKED.sub("", file.name).endswith(ending) and not DAILY.search(file.name)
    )
    if not files:
        raise RuntimeError(
            f"{lists} has no list {ending.strip('_')}. Leave out --lists, so that apt fetches it, "
            "or let Acquire::Languages name the language and run apt-get update."
        )
    return files


def entries(file: Path) -> Iterator[dict[str, str]]:
    """The entries of one list: field -> value, lines joined with line ends."""
    packed = PACKED.search(file.name)
    command = [HELPER, "cat-file", str(file)]
    raw = subprocess.run(command, capture_output=True, check=True).stdout if packed else file.read_bytes()
    for block in raw.decode("utf-8", errors="replace").split("\n\n"):
        entry: dict[str, str] = {}
        name = ""
        for line in block.split("\n"):
            if line[:1] == " ":
                entry[name] += f"\n{line}"
            elif ": " in line or line.endswith(":"):
                name, _, value = line.partition(":")
                entry[name] = value.strip()
        if "Package" in entry:
            yield entry


def descriptions(lists: Path, language: str, sources: dict[str, str]) -> dict[str, Description]:
    """Hash of the English description -> the description in a language, each once."""
    read: dict[str, Description] = {}
    for file in found(lists, f"_Translation-{language}"):
        for entry in entries(file):
            text = entry.get(f"Description-{language}")
            key = entry.get("Description-md5")
            if text and key and key not in read:
                synopsis, *body = text.split("\n")
                package = entry["Package"]
                read[key] = Description(sources.get(package, package), synopsis.strip(), paragraphs(body))
    return read


def paragraphs(lines: list[str]) -> tuple[str, ...]:
    """What stands between lines with a single dot, each in one line."""
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.strip() == ".":
            blocks.append([])
        else:
            blocks[-1].append(line.strip())
    return tuple(" ".join(block) for block in blocks if block)


def pairs(ours: Description, theirs: Description, most: int) -> Iterator[Pair]:
    """Synopsis with synopsis, and paragraph with paragraph where there are equally many; what is not translated, or far
    longer on one side, is left out."""
    matched = [(ours.synopsis, theirs.synopsis)]
    if len(ours.paragraphs) == len(theirs.paragraphs):
        matched += zip(ours.paragraphs, theirs.paragraphs, strict=True)
    for one, other in matched:
        translated = one != other and "<trans>" not in other
        alike = 1 / 3 < (len(one) + 10) / (len(other) + 10) < 3
        if translated and alike and max(len(one), len(other)) <= most:
            yield one, other


def write(folder: Path, rows: list[tuple[str, Pair]], names: Pair) -> dict:
    """Write the pairs in three parts by source package; returns how many there are, and their hashes."""
    split: dict[str, list[Pair]] = {part: [] for part in PARTS}
    for source, pair in rows:
        split[part_of(source)].append(pair)
    seen: set[str] = set()
    told: dict = {}
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("test", "validation", "train"):  # what is judged on is kept, what is trained on gives way
        kept, own = [], set()
        for pair in split[part]:
            keys = {key(text) for text in pair}
            # Of pairs with one side in common the first is kept; so a text has one translation.
            if not keys & seen and not keys & own:
                kept.append(pair)
                own |= keys
        seen |= own
        lines = "".join(
            json.dumps(dict(zip(names, pair, strict=True)), ensure_ascii=False) + "\n" for pair in kept
        )
        (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")
        if part == "train":  # running text of both sides, for pretraining
            (folder / "text.txt").write_text(
                "\n\n".join(text for pair in kept for text in pair) + "\n", encoding="utf-8"
            )
        told[part] = {"pairs": len(kept), "sha256": hashlib.sha256(lines.encode()).hexdigest()}
    return {part: told[part] for part in PARTS}


def part_of(source: str) -> str:
    """The part of a source package, by its name alone."""
    place = int.from_bytes(hashlib.blake2b(source.encode(), digest_size=4).digest()) % 100
    return (
        "test"
        if place < PARTS["test"]
        else "validation"
        if place < PARTS["test"] + PARTS["validation"]
        else "train"
    )


def key(text: str) -> str:
    """What makes two texts equal: the same words, whatever their case and spacing."""
    return " ".join(text.split()).casefold()


if __name__ == "__main__":
    sys.exit(main())
