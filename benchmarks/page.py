"""The page of results, docs/benchmarks.md: one section for each script, which may end with notes by hand."""

from pathlib import Path

from layershare.result import write_atomic

BY_HAND = "<!-- by hand -->"


def write(docs: Path, section: str) -> None:
    """Put the section, whose first line is its title, in its place on the page, or at its end."""
    title = section.partition("\n")[0]
    text = docs.read_text(encoding="utf-8") if docs.is_file() else "# Benchmarks\n"
    before, found, rest = text.partition(f"{title}\n")
    after = rest[rest.index("\n## ") + 1 :] if found and "\n## " in rest else ""
    docs.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(docs, f"{before.rstrip()}\n\n{section.rstrip()}\n" + (f"\n{after}" if after else ""))


def notes(docs: Path, title: str) -> str:
    """What stands by hand at the end of a section: how its rows were made, where no single command made them."""
    text = docs.read_text(encoding="utf-8") if docs.is_file() else ""
    section = text.partition(f"{title}\n")[2].partition("\n## ")[0]
    return (BY_HAND + found).rstrip() if (found := section.partition(BY_HAND)[2]) else ""
