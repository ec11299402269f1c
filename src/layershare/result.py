"""What a run measured, as one frozen value that can be printed, saved and compared.  No torch.

``Result`` holds a ``Figures`` per model (the first is the original) and what is needed to believe them: data
hashes, seed, command, versions, machine.  Parameters, bytes, memory, FLOPs and latency are separate figures
on purpose: sharing moves the first three and not the last two.
"""

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from platform import python_version
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from layershare.config import Config
from layershare.errors import StoreError

FORMAT = 1
FILE = "result.json"
MISSING = "-"
BYTES_NOT_FLOPS = "Sharing saves bytes, not FLOPs."
WHY = "A shared position still runs, so compute and latency are reported apart."


def _plain(value: Any) -> Any:
    """``value`` as JSON gives it back (tuples become lists), so that a loaded result equals the saved one."""
    return json.loads(json.dumps(value, default=lambda scalar: scalar.item()))


Plain = BeforeValidator(_plain)


def versions() -> dict[str, str]:
    """Installed versions of what a result depends on, read without importing any of it."""
    found = {"python": python_version()}
    for name in ("layershare", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


class _Saved(Config):
    """A configuration whose JSON can hold a loss that is not a number."""

    model_config = ConfigDict(ser_json_inf_nan="strings")


class Latency(_Saved):
    """Wall time of one forward pass, in milliseconds."""

    batch: int = Field(gt=0, description="texts in the batch")
    p50_ms: float
    p95_ms: float
    runs: int = Field(gt=0, description="timed runs behind the two numbers")
    tokens: int | None = Field(None, description="tokens per text, padding included")


class Figures(_Saved):
    """One measured model.  ``None`` means not measured, never zero."""

    label: str
    metrics: dict[str, float] = Field(default_factory=dict, description="quality on held-out data")
    parameters_unique: int = Field(description="numbers stored: each Parameter object counted once")
    parameters_effective: int = Field(description="numbers used: each Parameter counted once per use")
    layer_parameters_unique: int = Field(description="numbers stored inside the layer stacks")
    layer_parameters_effective: int = Field(description="numbers used inside the layer stacks")
    bytes_on_disk: int | None = Field(None, description="weight files only")
    peak_memory_bytes: int | None = Field(None, description="peak resident memory to load and run one batch")
    flops_per_text: int | None = Field(None, description="2 per multiply-add, matrix products only")
    sparsity: float | None = Field(
        None, ge=0, le=1, description="zeros among the stored weights of the layers' matrices"
    )
    latency: list[Latency] = Field(default_factory=list)

    def speed(self, batch: int, tokens: int | None = None) -> Latency | None:
        """The latency at this batch size (and this length, if given), or None if it was not measured."""
        found = (speed for speed in self.latency if speed.batch == batch and tokens in (None, speed.tokens))
        return next(found, None)


class Row(NamedTuple):
    """One line of the before/after table: a formatted value per model and its share of the first model's."""

    label: str
    values: tuple[str, ...]
    ratios: tuple[float | None, ...]


class Result(_Saved):
    """Everything one run found out."""

    format: int = FORMAT
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    versions: dict[str, str] = Field(default_factory=versions)
    machine: str = Field("", description="processor and threads the latencies belong to")
    source: str = Field("", description="the model that was compressed: a hub name or a folder name")
    task: str = Field("", description="what the model is for; nothing where that was not asked")
    metric: str = Field("", description="name of the headline metric, a key of Figures.metrics")
    higher_is_better: bool = True
    unit: str = Field("text", description="what one input is: a text, an image")
    data: Annotated[dict[str, Any], Plain] = Field(default_factory=dict, description="files, sha256, sizes")
    seed: int | None = None
    command: str = ""
    models: list[Figures] = Field(
        min_length=1, description="the original first, then the result, then baselines"
    )
    plan: Annotated[dict[str, Any] | None, Plain] = None
    plan_picture: str = ""
    history: Annotated[list[dict[str, Any]], Plain] = Field(
        default_factory=list, description="step, loss, ..."
    )
    curve: Annotated[list[dict[str, Any]], Plain] = Field(
        default_factory=list, description="points of a trade-off: threshold, quality, times_as_fast, ..."
    )
    trials: Annotated[list[dict[str, Any]], Plain] = Field(
        default_factory=list, description="of a search: index, name, change, stored, plan, ..."
    )
    seconds: dict[str, float] = Field(default_factory=dict, description="wall time of each stage")
    notes: list[str] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _not_from_the_future(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("format"), int) and values["format"] > FORMAT:
            raise StoreError(
                f"This result has format {values['format']}; this layershare reads up to {FORMAT}.",
                "Update layershare, or measure again.",
            )
        return values

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Reads ``path``, a JSON file or a folder that has a ``result.json``.

        Raises:
            StoreError: no such file, not JSON, a missing or misspelt key, or a newer format.
        """
        file = _file(path)
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise StoreError(
                f"{file}: cannot be read ({error.strerror}).", "Is this the folder of a run?"
            ) from None
        except ValueError as error:
            raise StoreError(f"{file}: not JSON ({error}).", "Measure again.") from None
        return cls.parse(values, where=str(file), error=StoreError)

    def save(self, path: str | os.PathLike) -> Path:
        """Writes ``path`` (a file, or a folder for ``result.json``) whole or not at all; returns the file."""
        return write_atomic(_file(path), self.model_dump_json(indent=2) + "\n")

    def ratio(self, figure: Callable[[Figures], float | None], model: int = 1) -> float | None:
        """``figure`` of ``models[model]`` over the original's, or None if either was not measured."""
        if model >= len(self.models):
            return None
        return _ratio(figure(self.models[model]), figure(self.models[0]))

    def headline(self, model: int = 1) -> str:
        """One sentence: the share of the layer parameters still stored, and of the headline metric left."""
        size = self.ratio(lambda figures: figures.layer_parameters_unique, model)
        quality = self.ratio(lambda figures: figures.metrics.get(self.metric), model)
        lower = "" if self.higher_is_better else " (lower is better)"
        said = [
            f"{percent(size)} of the layer parameters" if size is not None else "",
            f"{percent(quality)} of {spell(self.metric)}{lower}" if quality is not None else "",
        ]
        return ", ".join(filter(None, said)) or f"{self.models[0].label}: measured, not compared"

    def rows(self) -> list[Row]:
        """The before/after table as data: quality, size, cost; figures nobody measured are left out."""
        names = sorted(
            {name for model in self.models for name in model.metrics},
            key=lambda name: (name != self.metric, name),
        )
        shapes = {(speed.batch, speed.tokens) for model in self.models for speed in model.latency}
        models = self.models
        rows = [
            *(_row(spell(name), "{:.4f}", [model.metrics.get(name) for model in models]) for name in names),
            _row("layer parameters, stored", "{:,}", [model.layer_parameters_unique for model in models]),
            _row("layer parameters, used", "{:,}", [model.layer_parameters_effective for model in models]),
            _row("all parameters, stored", "{:,}", [model.parameters_unique for model in models]),
            _row("all parameters, used", "{:,}", [model.parameters_effective for model in models]),
            *(
                [_row("zeros in the layers", "{:.1%}", [model.sparsity for model in models])]
                if any(model.sparsity for model in models)
                else []
            ),
            _row("weights on disk", "{:.1f} MB", [_scaled(model.bytes_on_disk, 1e-6) for model in models]),
            _row("peak memory", "{:.1f} MB", [_scaled(model.peak_memory_bytes, 1e-6) for model in models]),
            _row(
                f"compute per {self.unit}",
                "{:.3f} GFLOP",
                [_scaled(model.flops_per_text, 1e-9) for model in models],
            ),
        ]
        for batch, tokens in sorted(shapes, key=lambda shape: (shape[0], shape[1] or 0)):
            where = f"batch {batch}" + (f" x {tokens} tokens" if tokens else "")
            speeds = [model.speed(batch, tokens) for model in models]
            rows.append(
                _row(f"p50, {where}", "{:.2f} ms", [speed.p50_ms if speed else None for speed in speeds])
            )
            rows.append(
                _row(f"p95, {where}", "{:.2f} ms", [speed.p95_ms if speed else None for speed in speeds])
            )
        return [row for row in rows if any(value != MISSING for value in row.values)]

    def table(self) -> str:
        """The before/after table as plain text, for a terminal."""
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        form = "  ".join(f"{{:{'>' if place else '<'}{width}}}" for place, width in enumerate(widths))
        lines = [form.format(*row) for row in cells]
        rule = "-" * len(lines[0])
        return "\n".join([self.headline(), "", lines[0], rule, *lines[1:], rule, f"{BYTES_NOT_FLOPS} {WHY}"])

    def markdown(self) -> str:
        """The before/after table for a README."""
        head, *body = [[cell.replace("|", "\\|") for cell in row] for row in self._cells()]
        rule = ["---"] + ["---:"] * (len(head) - 1)
        lines = ["| " + " | ".join(row) + " |" for row in [head, rule, *body]]
        return "\n".join([*lines, "", f"**{BYTES_NOT_FLOPS}** {WHY}"])

    def _cells(self) -> list[list[str]]:
        """The table as text: a label, the original, then a value and a ratio for every other model."""
        first, *others = (model.label for model in self.models)
        cells = [["", first, *(cell for label in others for cell in (label, "ratio"))]]
        for row in self.rows():
            pairs = zip(row.values[1:], row.ratios[1:], strict=True)
            cells.append(
                [
                    row.label,
                    row.values[0],
                    *(cell for value, ratio in pairs for cell in (value, percent(ratio))),
                ]
            )
        return cells


def spell(metric: str) -> str:
    """A metric's name in running text: the persons among them get their capital."""
    return metric.capitalize() if metric in ("spearman", "pearson") else metric.replace("_", " ")


def percent(ratio: float | None) -> str:
    """0.502 -> ``50.2 %``; a figure that was not measured is a dash."""
    return MISSING if ratio is None else f"{100 * ratio:.1f} %"


def command() -> str:
    """The command line that is running, of paths only the last name; nothing within Python."""
    if not sys.argv[0].endswith("layershare"):
        return ""
    return shlex.join(["layershare", *map(_without_folder, sys.argv[1:])])


def without_folders(files: Mapping[str, Any]) -> dict[str, Any]:
    """``files`` by name instead of by path; where two have one name, the second is ``NAME (2)``."""
    found: dict[str, Any] = {}
    for path, value in files.items():
        name = Path(path).name
        taken = sum(Path(other).name == name for other in list(files)[: len(found)])
        found[f"{name} ({taken + 1})" if taken else name] = value
    return found


def _without_folder(word: str) -> str:
    key, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    path = Path(value)
    private = path.is_absolute() or value.startswith(("~", "..")) or (os.sep in value and path.exists())
    return f"{key}{equals}{path.name if private and path.name else value}"


def write_atomic(path: str | os.PathLike, text: str) -> Path:
    """Writes ``text`` beside ``path`` and renames it into place: readers see the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o644)  # mkstemp gives 0600, and a model folder is meant to be shared
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    return path


def _file(path: str | os.PathLike) -> Path:
    return Path(path) / FILE if Path(path).is_dir() else Path(path)


def _ratio(value: float | None, original: float | None) -> float | None:
    """None where a share means nothing: not measured, or an original that is zero or negative."""
    return None if value is None or original is None or not original > 0 else value / original


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit


def _row(label: str, form: str, numbers: Sequence[float | None]) -> Row:
    values = tuple(MISSING if number is None else form.format(number) for number in numbers)
    return Row(label, values, tuple(_ratio(number, numbers[0]) for number in numbers))
