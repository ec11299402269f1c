"""Make the config of any model small: few layers, narrow, a small vocabulary. By the kinds of its fields.

No model is named here. A field's kind follows from the words in its name and from what it is next to; the sizes are
chosen so that the usual relations hold by themselves (hidden = heads x head size, equal widths stay equal, everything
divides by a power of two). What does not build or run like that gets another :class:`Size`.
"""

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig


@dataclasses.dataclass(frozen=True)
class Size:
    """How small. The defaults suit most models, ``SIZES`` are tried in turn."""

    width: int = 64
    inner: int = 128
    heads: int = 4
    layers: int = 4
    vocabulary: int = 128
    experts: int = 8
    positions: int = 128
    image: int = 32
    patch: int = 8
    window: int = 4
    keep: str = "^$"
    """Names of fields to leave alone."""
    fill: bool = False
    """Give a value to sizes that are None by default: some classes cannot do without."""

    @property
    def head(self) -> int:
        return self.width // self.heads


SIZES = (
    Size(),
    Size(fill=True),
    Size(width=256, inner=256, heads=2, keep="window|patch"),
    Size(image=128),
    Size(layers=8, keep="window"),
    Size(keep="heads|groups"),
    Size(keep="image|patch|window|positions?$|length|channels|dims?$|(^|_)sizes$|strides?$"),
    Size(width=128, inner=256, heads=8, image=128, keep="patch|window|kernel"),
    Size(width=256, inner=512, heads=8, image=224, layers=6, keep="patch|window|groups|image"),
)

# The first kind whose words are in the name of a field decides; ``keep`` leaves the value as it is.
KINDS: tuple[tuple[str, str], ...] = (
    ("token", r"token_(id|index)$|_idx$|_index$|(pad|bos|eos)_id$|_codes$"),
    (
        "keep",
        r"kernel|strides?$|padding|factor|ratio|rate$|scale|expand|bins$|mel|num_labels|type_vocab|buckets",
    ),
    (
        "keep",
        r"codebooks|num_channels|in_channels$|input_channels|audio_channels|quantizers|dilation|temporal_patch",
    ),
    (
        "keep",
        r"(feat_extract|postnet|dense|shared|replace|adapter|nextn|predictor)_(.*_)?(layers?|depth)$|max_(depth|bins)",
    ),
    (
        "keep",
        r"(residual|conv|window|mtp|iou_head|lqe)_(.*_)?(layers?|depth)$|(residual|window)_layers|layer_id$",
    ),
    ("keep", r"n_points|feature_levels|per_layer_input$"),
    ("few", r"per_tok(en)?$|top_?k$|topk_(group|blocks)|moe_k$|index_topk"),
    ("groups", r"(^|_)n?_?groups?$|expert_groups?$"),
    ("vocabulary", r"vocab|codebook_size"),
    (
        "layers",
        r"(^|_)(layers?|depth|n_layers?|depths|blocks|block_repeats|encoder_blocks|blocks_per_stage)$",
    ),
    ("period", r"period$|interval$|frequency$|sparse_step$|_pattern$|_every"),
    ("offset", r"offset$"),
    ("experts", r"experts$"),
    ("head", r"head_dim$|rotary_dim$|d_kv$|d_head$|head_size$|kv_channels$|dim_head$|attention_head_dim$"),
    ("kv", r"(kv|key_value|key).*heads?$"),
    ("heads", r"(^|_)heads?(_per_stage)?$|heads$|n_heads?$"),
    ("image", r"(image|img|crop)_size$|image_sizes$"),
    ("patch", r"patch_size$"),
    (
        "window",
        r"window(_size)?$|window_size_per_stage$|sliding_window|attention_window|local_attention|chunk_size$",
    ),
    ("patches", r"tokens_per_image|image_seq_length|num_image_tokens|num_patches$"),
    (
        "positions",
        r"positions?(_embeddings)?$|max_.*(len|length)$|n_ctx$|max_seq|context_length$|seq_length$",
    ),
    ("inner", r"intermediate|ffn|inner|mlp_dim|d_ff|feedforward|linear_units"),
    (
        "width",
        r"hidden|dims?$|dim_per|embed|sizes?$|width|channels|embd|filters?|units|rank|d_model|features|state|latent",
    ),
)
# Values for fields that have none by default but cannot do without one.
VALUES: dict[str, Any] = {
    "prediction_length": 4,
    "vocabulary_map": {"<image>": 5},
    "attn_layer_indices": [1, 3],
}


MISSING = 1 << 30
"""Stands for the value of a field that has none."""


def shrink(config: PretrainedConfig, size: Size = SIZES[0]) -> PretrainedConfig:
    """A small config of the same class. Lists that the class derives from other fields are derived anew."""
    return type(config)(**_changes(config, size))


def small_configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """``shrink`` with every size that gives a valid config, the smallest first."""
    for size in SIZES:
        try:
            yield shrink(config, size)
        except Exception:  # noqa: S112 - the class refuses these values; the next size may suit it
            continue


def _changes(config: PretrainedConfig, size: Size) -> dict[str, Any]:
    """Field values that differ from what the class would choose by itself."""
    fields = dataclasses.fields(config)
    default, types = {f.name: f.default for f in fields}, {f.name: f.type for f in fields}
    values = {name: config.__dict__[name] for name in default if name in config.__dict__}
    lengths = {
        value for name, value in values.items() if isinstance(value, int) and kind_of(name) == "layers"
    }
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PretrainedConfig):
            changed[name] = shrink(value, size)
        elif name in VALUES and value is None:
            changed[name] = VALUES[name]
        elif size.fill and value is None and "int" in str(types[name]) and _lacking(name):
            changed[name] = _number(name, MISSING, values, size)
        elif re.search(size.keep, name):
            continue
        elif isinstance(value, list | tuple):
            if default[name] is not None or not lengths & {len(value)}:
                changed[name] = _list(name, value, lengths, values, size)
        elif isinstance(value, dict):
            changed[name] = _dict(value, values, size)
        elif isinstance(value, int) and not isinstance(value, bool):
            changed[name] = _number(name, value, values, size)
    new = values | changed
    return {
        name: new[name]
        for name in new
        if new[name] != default[name] and _given(values[name], new[name], default[name])
    }


def _given(value: Any, new: Any, default: Any) -> bool:
    """Whether the class must be told: a new value, or one that was set (where None is the default, it was derived)."""
    return new is not value or default is not None or isinstance(value, str)


def _lacking(name: str) -> bool:
    """Whether a field that is None may be one that the model cannot do without."""
    kinds = ("experts", "few", "head", "groups", "inner", "kv")
    return kind_of(name) in kinds or re.match(r"(image|audio|video)_token", name) is not None


def kind_of(name: str) -> str:
    return next((kind for kind, words in KINDS if re.search(words, name)), "keep")


def _number(name: str, value: int, beside: Mapping[str, Any], size: Size) -> int:
    match kind_of(name):
        case "token":
            return _token(value, beside, size)
        case "layers":
            return size.layers if value >= 2 else value
        case "few":
            return min(value, 2)
        case "groups":
            return 1 if name.startswith("topk") else min(value, 2)
        case "vocabulary":
            return min(value, size.vocabulary)
        case "patches":
            return min(value, (size.image // size.patch) ** 2)
        case "period":
            return min(value, 2)
        case "offset":
            return min(value, 1)
        case "experts":
            return min(value, size.experts)
        case "kv":
            return _power(min(value, size.heads if value == _own_heads(beside) else max(size.heads // 2, 1)))
        case "heads":
            return _heads(name, value, beside, size)
        case "head":
            return _head(name, value, beside, size)
        case "width" if "embed_dim" in name and _in_stages(beside):
            return min(value, size.width // 4)  # it doubles from stage to stage
        case "image" | "patch" | "window" | "positions" | "inner" | "width" as kind:
            return min(value, getattr(size, kind))
    return value


def _in_stages(beside: Mapping[str, Any]) -> bool:
    """Whether a list in the same config gives the number of layers of each stage."""
    return any(
        isinstance(value, list | tuple) and kind_of(name) == "layers" for name, value in beside.items()
    )


def _token(value: int, beside: Mapping[str, Any], size: Size) -> int:
    """Distinct small ids in the order of the original ones: special tokens stay different."""
    if value < 0:
        return value
    if value == MISSING:
        return size.vocabulary // 2 - 1  # inputs are drawn from the upper half
    fields = (v if isinstance(v, list | tuple) else [v] for n, v in beside.items() if kind_of(n) == "token")
    ids = {v for values in fields for v in values if isinstance(v, int) and v >= 0}
    return sorted(ids).index(value) if max(ids) >= size.vocabulary // 2 else value


def _own_heads(beside: Mapping[str, Any]) -> int | None:
    return next((v for n, v in beside.items() if kind_of(n) == "heads" and isinstance(v, int)), None)


def _heads(name: str, value: int, beside: Mapping[str, Any], size: Size) -> int:
    """Where heads x head size was a multiple of a width, it stays that multiple."""
    stem = _stem(name)
    sizes = [v for n, v in beside.items() if kind_of(n) == "head" and isinstance(v, int) and _stem(n) == stem]
    widths = [
        v for n, v in beside.items() if n in ("hidden_size", "d_model", "n_embd") and isinstance(v, int)
    ]
    for head, width in ((h, w) for h in sizes for w in widths):
        times, rest = divmod(value * head, width)
        if times > 1 and not rest:
            return times * size.heads
    return _power(min(value, size.heads))


def _power(value: int) -> int:
    """The power of two at or below: it divides every width."""
    return 1 << (value.bit_length() - 1) if value > 0 else value


def _stem(name: str) -> str:
    """What heads and their size have in common in their names: ``mamba`` in ``mamba_n_heads`` and ``mamba_d_head``."""
    return re.sub(r"_?(num|n|d|attention|heads?|dim|size|kv|channels)(?=_|$)", "", name).strip("_")


def _head(name: str, value: int, beside: Mapping[str, Any], size: Size) -> int:
    parts = [n for n in ("qk_nope_head_dim", "qk_rope_head_dim") if n in beside]
    if name not in parts and len(parts) == 2 and value == sum(beside[n] for n in parts):
        return 2 * min(value, size.head)
    return min(value, size.head)


def _list(name: str, value: Any, lengths: set[int], beside: Mapping[str, Any], size: Size) -> Any:
    """Item by item; a list with an entry per layer is cut, positions of layers move with the depth."""
    items = list(value)
    if not items or isinstance(items[0], str | float | bool | dict):
        return type(value)(items[: size.layers]) if len(items) in lengths and items else value
    if all(isinstance(item, int) for item in items):
        depth = max(lengths, default=0)
        if re.search(r"ind(ex|ic)es|indexes|idxs|layers$|_layer_ids|blocks$|feature_layer$", name) and depth:
            moved = [item if item < 0 else item * size.layers // depth for item in items if item <= depth]
            return type(value)(dict.fromkeys(moved))
        if len(items) in lengths and kind_of(name) == "keep":
            return type(value)(items[: size.layers])
        if kind_of(name) == "layers":
            return type(value)(min(item, size.layers) for item in items)
        items = [
            _number(name.removesuffix("s") if kind_of(name) == "keep" else name, i, beside, size)
            for i in items
        ]
        return type(value)(items)
    return value


def _dict(value: Mapping[str, Any], beside: Mapping[str, Any], size: Size) -> dict[str, Any]:
    """Rotary sections add up to half a head."""
    changed: dict[str, Any] = copy.deepcopy(dict(value))
    for name, item in changed.items():
        if isinstance(item, dict):
            changed[name] = _dict(item, beside, size)
        elif str(name).endswith("_section") and isinstance(item, list):
            half = size.head // 2 if sum(item) > size.head // 2 else sum(item)
            scaled = [max(part * half // sum(item), 1) for part in item]
            changed[name] = [half - sum(scaled[1:]), *scaled[1:]]
    return changed
