"""Look at the safetensors files of a shared model before they are loaded: names, shapes and types, no weights."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter

from layershare.errors import StoreError
from layershare.stacks import find_stacks

HINT = "Save or download it again."
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Entry(NamedTuple):
    """What a header says of one tensor."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def check_files(
    files: Sequence[Path], model: PreTrainedModel, known: Sequence[str], conversions: Sequence[Any]
) -> None:
    """Raise StoreError naming the file (and tensor) that is missing, cut off, no safetensors file, or does not fit.

    ``model``: on the meta device, as it will be filled. ``conversions``: those of transformers for this model; tensors
    that they make others of are left to it, and so are shapes outside the stacks (``ignore_mismatched_sizes``). A
    tensor may have the type that config.json names, or that most of the weights have, or float32, in which models keep
    what is delicate; a float parameter never comes from integers.
    """
    entries = [entry for file in files for entry in _header(file)]
    types = _types(entries) | (_declared(files[0].parent / "config.json") if files else set())
    parameters, prefix = dict(model.named_parameters(remove_duplicate=False)), model.base_model_prefix
    stacks = tuple(f"{stack.name}." for stack in find_stacks(model, known))
    # Copies, as transformers notes which of them were used.
    converters = [_copy(one) for one in conversions if isinstance(one, WeightConverter)]
    for file, name, shape, dtype in entries:
        names = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        inside = next((n for n in names if n in parameters), None)
        if inside is None or any(one.rename_source_key(name)[1] is not None for one in converters):
            continue
        target = parameters[inside]
        if shape != tuple(target.shape) and inside.startswith(stacks):
            raise StoreError(
                f"{file}: {name} has shape {list(shape)}, the model needs {list(target.shape)}.", HINT
            )
        if target.is_floating_point() and FLOATS.get(dtype) not in types | {"float32"}:
            raise StoreError(
                f"{file}: {name} is of type {dtype}, the model is of {' or '.join(sorted(types))}.", HINT
            )


def _header(file: Path) -> Iterator[Entry]:
    if file.suffix != ".safetensors":
        raise StoreError(
            f"{file}: shared models are loaded from safetensors files only.",
            "Save the model with save_pretrained of transformers 5.",
        )
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dict
                one = tensors.get_slice(name)
                yield Entry(file, name, tuple(one.get_shape()), one.get_dtype())
    except FileNotFoundError:
        raise StoreError(f"{file}: there is no such file, but the checkpoint needs it.", HINT) from None
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{file}: cut off or broken ({error}).", HINT) from None


def _types(entries: Sequence[Entry]) -> set[str]:
    """The type of float that most weights have."""
    sizes = Counter[str]()
    for entry in entries:
        if entry.dtype in FLOATS:
            sizes[FLOATS[entry.dtype]] += math.prod(entry.shape)
    return {name for name, _ in sizes.most_common(1)}


def _declared(config: Path) -> set[str]:
    """The types that a config names, its own and those of its parts."""
    try:
        return set(_dtypes(json.loads(config.read_text(encoding="utf-8"))))
    except (OSError, ValueError):  # a config from elsewhere: nothing is known
        return set()


def _dtypes(values: dict[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from _dtypes(value)


def _copy(converter: WeightConverter) -> WeightConverter:
    patterns = converter._original_source_patterns, converter._original_target_patterns
    return converter.copy(*patterns, operations=converter.operations)
