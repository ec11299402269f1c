"""The table of architectures: the stacks of every model type of transformers, found on the meta device."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig

from layershare.architectures.shrink import small_configs
from layershare.architectures.small import auto_classes, model_types
from layershare.errors import ModelError
from layershare.stacks import Stack, find_stacks

COMMAND = "layershare architectures --laws RESULTS -o docs/architectures.md"
# Packages that some models of transformers need; which of them are there decides which models can be built.
OPTIONAL = ("PIL", "timm", "torchvision", "torchaudio", "natten", "detectron2", "scipy", "sentencepiece")


@dataclass(frozen=True)
class Found:
    """Stacks of one kind: ``encoder.layers.*.blocks`` stands for one in each stage."""

    name: str
    lengths: tuple[int, ...]
    layer_class: str

    def __str__(self) -> str:
        lengths = (
            "+".join(map(str, self.lengths)) if len(self.lengths) <= 8 else f"{len(self.lengths)} stacks"
        )
        return f"`{self.name}` {lengths} x {self.layer_class.replace(' | ', ' or ')}"


@dataclass(frozen=True)
class Row:
    """One model type. ``reason`` says why there is no stack, or what was needed to build the model."""

    model_type: str
    auto_class: str = ""
    stacks: tuple[Found, ...] = ()
    share: float = 0.0
    """Part of the parameters that stands inside stacks."""
    reason: str = ""


@dataclass(frozen=True)
class Table:
    """All rows, and what came out when the laws were checked (model type -> outcome), if they were."""

    rows: tuple[Row, ...]
    laws: Mapping[str, Mapping[str, Any]]

    @property
    def found(self) -> int:
        return sum(bool(row.stacks) for row in self.rows)

    @property
    def passed(self) -> int:
        return sum(self.laws.get(row.model_type, {}).get("outcome") == "pass" for row in self.rows)

    def summary(self) -> str:
        of = f"{len(self.rows)} model types of transformers {transformers.__version__}"
        text = f"stacks found in {self.found} of {of}"
        return text + (f"; all laws kept by {self.passed} of {len(self.laws)} tried" if self.laws else "")

    def to_dict(self) -> dict[str, Any]:
        return {
            "transformers": transformers.__version__,
            "rows": [asdict(r) for r in self.rows],
            "laws": dict(self.laws),
        }

    def text(self) -> str:
        lines = [f"{row.model_type:32} {'; '.join(map(str, row.stacks)) or row.reason}" for row in self.rows]
        return "\n".join([*lines, "", self.summary()])

    def markdown(self) -> str:
        """The page docs/architectures.md."""
        return "\n".join(
            [*_head(self), *(_line(row, self.laws.get(row.model_type)) for row in self.rows), ""]
        )


def table(
    types: Iterable[str] | None = None, *, laws: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Table:  # fmt: skip
    """Survey ``types``, default all that an auto class of the installed transformers knows. No weights are made.

    ``laws``: the results file of ``benchmarks/architectures.py``, to be merged in.
    """
    rows = []
    for model_type in types or model_types():
        rows.append(survey(model_type))
        if progress is not None:
            progress(f"{model_type}: {len(rows[-1].stacks) or rows[-1].reason}")
    return Table(tuple(rows), _read(laws) if laws is not None else {})


def write(path: str | Path, made: Table) -> None:
    """Write the page."""
    Path(path).write_text(made.markdown(), encoding="utf-8")


def survey(model_type: str) -> Row:
    """One row. Where the default config lacks values that the model needs, a small config with values is looked at."""
    auto, reason = auto_classes(model_type), ""
    auto_class = "AutoModel" if "AutoModel" in auto else auto[0]
    for config in _configs(model_type):
        if isinstance(config, str):
            return Row(model_type, auto_class, reason=config)
        try:
            with torch.device("meta"):
                model = getattr(transformers, auto_class).from_config(config)
        except ImportError as error:
            return Row(model_type, auto_class, reason=_missing(error))
        except Exception as error:
            reason = reason or f"the default config does not build ({_first_line(error)})"
            continue
        return _row(model_type, auto_class, model, reason and f"{reason}; looked at a small one, with values")
    return Row(model_type, auto_class, reason=reason)


def _configs(model_type: str) -> Iterable[PretrainedConfig | str]:
    try:
        default = CONFIG_MAPPING[model_type]()
    except Exception as error:
        yield (
            _missing(error) if isinstance(error, ImportError) else f"no default config ({_first_line(error)})"
        )
        return
    yield default
    yield from small_configs(default)


def _row(model_type: str, auto_class: str, model: nn.Module, reason: str) -> Row:
    try:
        stacks = find_stacks(model)
    except ModelError as error:
        shared = "already shared" in error.message
        why = error.message.split(": ", 1)[1] if shared else "no layer stands twice, by class and shapes"
        return Row(model_type, auto_class, reason=why)
    total = sum(parameter.numel() for parameter in model.parameters())
    inside = sum(stack.size for stack in stacks)
    return Row(model_type, auto_class, tuple(_merge(stacks)), inside / max(total, 1), reason)


def _merge(stacks: Iterable[Stack]) -> Iterable[Found]:
    """Stacks that differ by a number in their names (stages, scales) in one entry."""
    groups: dict[tuple[str, str], list[int]] = {}
    for stack in stacks:
        name = re.sub(r"\.\d+(?=\.|$)", ".*", stack.name)
        groups.setdefault((name, stack.layer_class), []).append(stack.length)
    return (Found(name, tuple(lengths), cls) for (name, cls), lengths in groups.items())


def _missing(error: ImportError) -> str:
    found = re.search(r"requires the (\S+) library", str(error)) or re.search(
        r"No module named '(\w+)'", str(error)
    )
    return (
        f"needs the optional package {found[1]}"
        if found
        else f"needs an optional package ({_first_line(error)})"
    )


def _first_line(error: Exception) -> str:
    """What the error says, without the folders of this machine."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return re.sub(r" from '/[^']*'?", "", said)[:120]


def _read(laws: str | Path) -> dict[str, dict[str, Any]]:
    return {row["type"]: row for row in map(json.loads, Path(laws).read_text(encoding="utf-8").splitlines())}


PAGE = """# Architectures

Generated by `{command}`; do not edit. Each model is
built on the meta device from the default config of its type; its stacks are found by structure. Optional packages that
were there: {packages}.

**Stacks in {found} of {rows} model types** of transformers {version}
(of the {own} in `AutoModel`'s own mapping: {own_found}).
{laws}
| model type | stacks | share of parameters | laws | remarks |
|---|---|---:|---|---|"""
LAWS = """
A small random model of each type was shared by four presets and put to the laws by `benchmarks/architectures.py`:
**{passed} of {tried}** model types keep them all ({outcomes}).
*n/a* beside a pass counts laws that say nothing there: the unshared model with the same weights does not keep them
either, or has nothing that the preset could share.

The laws, for each preset: finite forward; saved and loaded with the auto class, outputs bit-identical; bytes on
disk within 2% of the unique ones (and the header); tied after loading and after an optimizer step; the same tokens
with and without cache, greedy and with 2 beams, where the model generates; `unshare` gives the same outputs (for a
basis: up to rounding).
"""


def _head(made: Table) -> list[str]:
    outcomes = Counter(row["outcome"] for row in made.laws.values())
    counted = ", ".join(f"{outcome}: {count}" for outcome, count in outcomes.most_common())
    laws = LAWS.format(passed=made.passed, tried=len(made.laws), outcomes=counted) if made.laws else ""
    own = _auto_model(made)
    return [
        PAGE.format(
            packages=", ".join(name for name in OPTIONAL if find_spec(name)),
            command=COMMAND, found=made.found, rows=len(made.rows), version=transformers.__version__,
            own=len(own), own_found=sum(bool(row.stacks) for row in own), laws=laws,
        )
    ]  # fmt: skip


def _auto_model(made: Table) -> list[Row]:
    return [row for row in made.rows if row.auto_class == "AutoModel"]


def _line(row: Row, law: Mapping[str, Any] | None) -> str:
    stacks = "<br>".join(map(str, row.stacks[:6])) + (
        f"<br>and {len(row.stacks) - 6} more" if row.stacks[6:] else ""
    )
    remark = row.reason if row.stacks == () or row.reason else ""
    outcome = ""
    if law is not None:
        skipped = len(law.get("skipped", ()))
        outcome = law["outcome"] + (
            f" ({law['kept']} kept, {skipped} n/a)" if law["outcome"] == "pass" else ""
        )
        if law["outcome"] in ("fail", "not built", "too slow"):
            remark = "; ".join(filter(None, (remark, law.get("reason", ""))))
    share = f"{row.share:.0%}" if row.stacks else ""
    return f"| {row.model_type} | {stacks} | {share} | {outcome} | {remark.replace('|', '/')[:240]} |"
