"""encode: everything that a Transformer computes on the way from a text to its output."""

import inspect
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layershare.errors import ModelError, OptionError

SHOWN = 4
"""So many values of a tensor stand in the table."""


@dataclass(frozen=True)
class Encoded:
    """What a model makes of one text of T tokens.

    Attributes:
        text: as it was given.
        tokens: as the tokenizer writes them, special ones too.
        ids: their numbers.
        tensors: name -> values without the batch dimension. ``last_hidden_state`` [T, d], ``pooled`` [d],
            ``hidden_states.0`` (the embeddings), ``hidden_states.1`` (behind the first layer), ... [T, d] each,
            ``attentions.0``, ... [heads, T, T], rows are the tokens that look. Of an encoder-decoder, whose decoder is
            given its start token only, these are called ``encoder_...``, ``decoder_...`` and ``cross_attentions.0``.
        pooling: where ``pooled`` comes from: the model's own ``pooler``, or the ``mean`` of the last hidden state.
    """

    text: str
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    tensors: dict[str, Tensor]
    pooling: str

    @property
    def attentions(self) -> dict[str, Tensor]:
        """The attention maps, [heads, tokens that look, tokens looked at] each, by name."""
        return {name: value for name, value in self.tensors.items() if "attentions." in name}

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-ready: tensors as nested lists beside their shape."""
        tensors = {
            name: {"shape": list(value.shape), "values": value.tolist()}
            for name, value in self.tensors.items()
        }
        return {
            "text": self.text, "tokens": list(self.tokens), "ids": list(self.ids), "pooling": self.pooling,
            "tensors": tensors,
        }  # fmt: skip

    def save(self, file: str | Path) -> None:
        """Write the tensors as ``.safetensors``, with ``input_ids``, text and tokens in it too."""
        from safetensors.torch import save_file

        file = Path(file)
        if file.suffix != ".safetensors":
            raise OptionError(f"{file}: tensors are written as .safetensors.", "Or print them with --json.")
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.part")
        told = {"text": self.text, "tokens": json.dumps(self.tokens), "pooling": self.pooling}
        named = {name: value.contiguous().clone() for name, value in self.tensors.items()}
        save_file({"input_ids": torch.tensor(self.ids), **named}, part, told)
        part.replace(file)

    def __str__(self) -> str:
        tokens = " ".join(f"{token}({number})" for token, number in zip(self.tokens, self.ids, strict=True))
        rows = [
            ("", "shape", "mean", "std", "min", "max", "values"),
            *map(_row, *zip(*self.tensors.items(), strict=True)),
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        if self.pooling == "mean":
            lines += ["", "pooled is the mean of the last hidden state: the model has no pooler of its own."]
        return "\n".join([f"{len(self.ids)} tokens: {tokens}", "", *lines])


def encode(text: str, model: str | Path, *, max_length: int | None = None) -> Encoded:
    """What the model in this folder, or of this hub name, makes of ``text``; shared or not, with any head or none.

    The weights are those of the checkpoint: nothing is drawn at random in place of a pooler that is not there.
    ``max_length``: cut the text to this many tokens (default: what the model takes, up to 512).

    Raises OptionError for an empty text, and ModelError where the model reads no text.
    """
    from layershare.store.open import load_model, load_tokenizer
    from layershare.tasks.encoding import encode as encode_texts
    from layershare.tasks.encoding import pad, usable_length

    if not text.strip():
        raise OptionError("The text is empty.")
    net: Any = load_model(model)
    tokenizer = load_tokenizer(model)
    base = getattr(net, net.base_model_prefix, net)
    with suppress(ValueError, AttributeError):  # what has no attention, or but one, needs no other
        base.set_attn_implementation("eager")  # the fused ones keep their maps to themselves
    if "input_ids" not in inspect.signature(base.forward).parameters:
        raise ModelError(
            f"{model}: a {net.config.model_type} model does not read text.", "Give a model of texts."
        )
    columns = encode_texts(tokenizer, [text], usable_length(tokenizer, net.config, max_length))
    rows = [{name: column[0] for name, column in columns.items() if name != "token_type_ids"}]
    inputs = pad(tokenizer, rows)
    if net.config.is_encoder_decoder:
        known = (getattr(net.config, "decoder_start_token_id", None), net.config.pad_token_id, 0)
        start = next(token for token in known if token is not None)
        inputs["decoder_input_ids"] = torch.tensor([[start]])
    with torch.no_grad():
        out = base(**inputs, output_hidden_states=True, output_attentions=True)
    ids = inputs["input_ids"][0].tolist()
    tensors, pooling = _collected(out)
    return Encoded(text, tuple(tokenizer.convert_ids_to_tokens(ids)), tuple(ids), tensors, pooling)


def _collected(out: Any) -> tuple[dict[str, Tensor], str]:
    """The tensors of a model's output by name, and how they were pooled."""
    given = {name: value for name, value in out.items() if value is not None}
    found = dict(_flat(given))
    own = given.get("pooler_output")
    last = given.get(
        "last_hidden_state" if "encoder_last_hidden_state" not in given else "encoder_last_hidden_state"
    )
    if last is None:
        states = [value for name, value in found.items() if "hidden_states." in name]
        if not states:
            raise ModelError("The model gives no hidden states.")
        last = states[-1][None]
    first = {
        "last_hidden_state": given.get("last_hidden_state", last)[0],
        "pooled": last[0].mean(0) if own is None else own[0],
    }
    return {
        name: value.float() for name, value in (first | found).items()
    }, "mean" if own is None else "pooler"


def _flat(given: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in given.items():
        if name.endswith(("hidden_states", "attentions")):
            yield from ((f"{name}.{i}", one[0]) for i, one in enumerate(value) if one is not None)


def _row(name: str, value: Tensor) -> tuple[str, ...]:
    flat = value.flatten()
    spread = float(flat.std()) if flat.numel() > 1 else 0.0
    figures = (float(flat.mean()), spread, float(flat.min()), float(flat.max()))
    some = ", ".join(f"{x:.4f}" for x in flat[:SHOWN].tolist()) + (", ..." if flat.numel() > SHOWN else "")
    return (name, "x".join(map(str, value.shape)), *(f"{x:.4f}" for x in figures), some)
