"""The page of results, docs/benchmarks.md: one section for each script."""

from pathlib import Path

from layershare.result import write_atomic


def write(docs: Path, section: str) -> None:
    """Put the section, whose first line is its title, in its place on the page, or at its end."""
    title = section.partition("\n")[0]
    text = docs.read_text(encoding="utf-8") if docs.is_file() else "# Benchmarks\n"
    before, found, rest = text.partition(f"{title}\n")
    after = rest[rest.index("\n## ") + 1 :] if found and "\n## " in rest else ""
    docs.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(docs, f"{before.rstrip()}\n\n{section.rstrip()}\n" + (f"\n{after}" if after else ""))
