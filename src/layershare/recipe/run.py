"""Make the stages of a recipe, those that are not made yet, or say what would be made."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from layershare import __version__, demo, stages
from layershare.errors import LayershareError, OptionError
from layershare.recipe.graph import PACKAGE, Recipe
from layershare.recipe.sizes import Size, of_folder, of_stage, steps_of
from layershare.recipe.verbs import PretrainStage, Source, Stage, may_make, needs_data
from layershare.result import Result
from layershare.store.open import local_folder

LEFT_OUT = {"data", "plan", "tokenizer", "cache"}
"""Fields that name files: what is in them counts, not where they are."""


@dataclass(frozen=True)
class Planned:
    """A stage: ``done`` (found finished), ``made`` (now), or ``to do``. Figures that are not known are None."""

    name: str
    verb: str
    takes: tuple[str, ...]
    state: str
    folder: str
    parameters: int | None = None
    bytes: int | None = None
    steps: int | None = None
    exact: bool = True
    seconds: float | None = None


@dataclass(frozen=True)
class Report:
    """What a run did, or would do, stage by stage; ``tables`` are those of its evaluations."""

    name: str
    out: str
    planned: tuple[Planned, ...]
    tables: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"name": self.name, "out": self.out, "stages": [asdict(one) for one in self.planned]}

    def __str__(self) -> str:
        head = ("stage", "verb", "from", "state", "parameters", "MB", "steps", "seconds")
        rows = [head, *(_row(one) for one in self.planned)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if place > 3 else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join([*(f"{table}\n" for table in self.tables), *lines, "", f"{self.name}: {self.out}"])


def plan(recipe: Recipe, out: str | Path | None = None) -> Report:
    """What :func:`run` would do, with predicted parameters, bytes and steps. Writes nothing, reads no weights.

    Raises what a stage that is to be made would raise for its plan or its data, with the stage named.
    """
    home = _home(recipe, out)
    planned: list[Planned] = []
    sizes: dict[str, Size | None] = {}
    fresh: set[str] = set()  # stages that are to be made, so that their hashes are not known
    read: list[Source] = []
    with tempfile.TemporaryDirectory() as scratch:  # for the data of a package
        for name, stage in recipe.stages.items():
            uses = recipe.uses(name)
            models = _models(recipe, uses, home, download=False)
            source = _here(recipe.source(name), Path(scratch), recipe.seed)
            known = not fresh & set(uses.values())
            with _naming(name):
                done = known and stages.matches(home / name, _inputs(recipe, stage, models, source))
                if not done:
                    fresh.add(name)
                    if source is not None and source not in read and needs_data(stage):
                        _try_reading(stage, source)
                        read.append(source)
                if not may_make(stage):  # which may begin with a model type
                    for wanted, where in zip(uses.values(), models.values(), strict=True):
                        if wanted not in sizes:
                            sizes[wanted] = of_folder(where)
                taken = {
                    field: size for field, wanted in uses.items() if (size := sizes.get(wanted)) is not None
                }
                size = sizes[name] = of_stage(stage, taken, source) if stage.MAKES != "report" else None
            planned.append(
                Planned(
                    name, stage.verb, tuple(dict.fromkeys(uses.values())), "done" if done else "to do",
                    str(home / name),
                    parameters=None if size is None else size.parameters, bytes=None if size is None else size.bytes,
                    steps=steps_of(stage, source), exact=size is None or size.exact,
                )
            )  # fmt: skip
    return Report(recipe.name, str(home), tuple(planned))


def run(
    recipe: Recipe, out: str | Path | None = None, *, progress: Callable[[str], None] = lambda _: None
) -> Report:
    """Make every stage in ``out/STAGE``, and return what was done.

    A stage that is there and was made from the same inputs (hashes of models and data, settings, version) is skipped.
    One whose inputs changed is made anew and takes the place of the old one when it is whole. What was interrupted is
    gone on with; Ctrl-C and errors lose nothing that is finished.

    Raises what the verbs raise, with the stage named; what :func:`plan` finds wrong, before the first stage is made.
    """
    home = _home(recipe, out)
    planned, tables, foreseen = [], [], False
    for number, (name, stage) in enumerate(recipe.stages.items(), start=1):
        uses, folder = recipe.uses(name), home / name
        models = _models(recipe, uses, home, download=True)
        source = _here(recipe.source(name), home, recipe.seed)
        started = time.monotonic()
        inputs = _inputs(recipe, stage, models, source)
        title = f"[{number}/{len(recipe.stages)}] {name}: {stage.verb}"
        if not foreseen and not stages.matches(folder, inputs):
            plan(recipe, out)  # refuses now what would cost the training of the stages before
            foreseen = True

        def fill(
            part: Path, stage: Stage = stage, models: Mapping[str, str] = models, source: Source | None = source,
            title: str = title, started: float = started,
        ) -> dict[str, Any]:  # fmt: skip
            progress(title)
            stage.make(models, source, part, recipe.seed)
            again = {"settings": stage.model_dump(mode="json"), "models": dict(models), "seed": recipe.seed}
            data = None if source is None else source.model_dump(mode="json")
            return {"stage": again | {"data": data}, "seconds": round(time.monotonic() - started, 1)}

        with _naming(name):
            made = stages.make(folder, inputs, fill, replace=True)
        if not made:
            progress(f"{title}: already made, reused")
        one = Planned(
            name, stage.verb, tuple(dict.fromkeys(uses.values())), "made" if made else "done", str(folder),
            steps=steps_of(stage, source), seconds=(stages.record(folder) or {}).get("seconds"),
        )  # fmt: skip
        if stage.MAKES == "report":
            tables.append(Result.load(folder).table())
        else:
            size = of_folder(folder)
            one = replace(one, parameters=size.parameters, bytes=size.bytes)
        planned.append(one)
    return Report(recipe.name, str(home), tuple(planned), tuple(tables))


@contextmanager
def _naming(stage: str) -> Iterator[None]:
    """What is raised names the stage."""
    try:
        yield
    except LayershareError as error:
        raise type(error)(f"stage {stage}: {error.message}", error.hint) from error


def _try_reading(stage: Stage, source: Source) -> None:
    """Files that are not there, or do not have the columns, would cost the stages before."""
    if isinstance(stage, PretrainStage):  # reads a corpus by itself, and may be first
        for path in source.paths:
            _hash(path)
        return
    source.kind.read(source.paths, **source.reading())


def _inputs(recipe: Recipe, stage: Stage, models: Mapping[str, str], source: Source | None) -> dict[str, Any]:
    """Everything that decides what a stage makes."""
    settings = stage.model_dump(mode="json", exclude=LEFT_OUT | set(stage.REFERENCES))
    own = {
        field: _identity(value)
        for field in ("plan", "tokenizer")
        if (value := getattr(stage, field, None)) is not None
    }
    data = None
    if source is not None and needs_data(stage):
        held = (source.validation, source.test)
        hashes = [
            [_hash(path) for path in source.paths],
            *(None if file is None else _hash(Path(file)) for file in held),
        ]
        data = {"task": source.task, "columns": source.columns, "sha256": hashes}
        data |= source.model_dump(include={"settings", "skip_bad"}, exclude_defaults=True)
    return {
        "layershare": __version__,
        "settings": settings | ({"task": source.task} if source is not None else {}),
        "seed": recipe.seed,
        "models": {field: _identity(folder) for field, folder in models.items()},
        "files": own,
        "data": data,
    }


def _identity(source: str) -> Any:
    """A hash of a model with its tokenizer, or of a file; a model type goes by its name."""
    path = Path(source).expanduser()
    if path.is_file():
        return _hash(path)
    if not path.is_dir():
        return source
    words = path / "tokenizer.json"
    return [stages.fingerprint(path), _hash(words) if words.is_file() else None]


def _hash(path: Path) -> str:
    try:
        found: str = stages.hash_of(path.expanduser()).hexdigest()
    except OSError as error:
        raise OptionError(f"{path}: cannot be read ({error.strerror}).") from None
    return found


def _here(source: Source | None, home: Path, seed: int) -> Source | None:
    """The data as files; those of a package are written to a folder of their own in ``home``."""
    if source is None or source.package is None:
        return source
    folder = home / f"data-{source.package}-{source.source}-{source.rows}-{seed}"
    files = {
        name: str(file) for name, file in demo.write_reviews(folder, source.rows, source.source, seed).items()
    }
    return Source(
        task=source.task,
        files=(files["train"],),
        validation=files["validation"],
        test=files["test"],
        columns=source.columns,
    )


def _models(recipe: Recipe, uses: Mapping[str, str], home: Path, *, download: bool) -> dict[str, str]:
    """Field -> folder, or hub name or model type, of what a stage takes."""
    found = {}
    for field, wanted in uses.items():
        if wanted in recipe.stages:
            found[field] = str((home / wanted).absolute())
        elif wanted.startswith(PACKAGE):
            found[field] = str(demo.model_folder(wanted.removeprefix(PACKAGE)))
        elif "/" in wanted and download and not Path(wanted).expanduser().exists():
            found[field] = str(
                local_folder(wanted)
            )  # what the hub gives is told by its weights, not its name
        else:
            found[field] = wanted
    return found


def _home(recipe: Recipe, out: str | Path | None) -> Path:
    return Path(out if out is not None else recipe.out).expanduser()


def _row(one: Planned) -> tuple[str, ...]:
    most = "" if one.exact else "<= "
    return (
        one.name,
        one.verb,
        ", ".join(one.takes),
        one.state,
        "-" if one.parameters is None else f"{most}{one.parameters:,}",
        "-" if one.bytes is None else f"{most}{one.bytes / 1e6:.1f}",
        "-" if one.steps is None else f"{one.steps:,}",
        "-" if one.seconds is None else f"{one.seconds:.1f}",
    )
