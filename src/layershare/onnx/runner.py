"""The runner of exported models: texts, images or sounds in, embeddings, labels or texts out."""

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from layershare.errors import DependencyError, ModelError, OptionError, StoreError
from layershare.onnx.decoding import decode, steps
from layershare.onnx.session import open_session
from layershare.onnx.sources import DUAL

MANIFEST = "layershare_onnx.json"
Arrays = dict[str, np.ndarray]
TYPES: dict[str, Any] = {"tensor(int64)": np.int64, "tensor(float)": np.float32}
"""Processors give other integers."""


def _mean(states: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return (states * mask[..., None]).sum(1) / np.maximum(mask.sum(1, keepdims=True), 1)


def _last(states: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return states[np.arange(len(states)), (np.arange(mask.shape[1]) * mask).argmax(1)]


POOLINGS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "mean": _mean,
    "cls": lambda states, _: states[:, 0],
    "lasttoken": _last,
    "max": lambda states, mask: np.where(mask[..., None] > 0, states, np.finfo(states.dtype).min).max(1),
}
"""(states [B, T, d], mask [B, T]) -> [B, d], by the names of the manifest."""


def load(folder: str | Path, *, threads: int | None = None) -> "Runner":
    """The exported model in ``folder``. ``threads``: compute threads of each operator; default: all cores.

    Raises StoreError if the folder is not an export, DependencyError without onnxruntime.
    """
    return Runner(folder, threads=threads)


class Runner:
    """An exported model.

    Attributes:
        kind: ``encoder``, ``vision`` and ``sound`` answer in one pass; ``decoder`` and ``encoder-decoder`` generate;
            ``dual-encoder`` has a graph for texts and one for images.
        config: the model's config.json.
        int8: whether it is quantised.
        sessions: the onnxruntime session of each graph, by name.
        exits: positions behind which a classifier may stop, see :mod:`layershare.exits`; the output ``exit`` says where
            it did, -1: nowhere. Texts of a batch leave together, so give one at a time.
        threshold: how sure an exit must be; None: as was chosen for it.
    """

    def __init__(self, folder: str | Path, *, threads: int | None = None) -> None:
        self.folder = Path(folder).expanduser()
        file = self.folder / MANIFEST
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            self.kind: str = said["kind"]
            self.eos: list[int] = said["eos"]
            self.start: list[int] = said["start"]
            self.languages: list[int] = said.get("languages", [])
            self.barred: list[int] = said["barred"]
            self.barred_first: list[int] = said["barred_first"]
            self.limit: int = said["max_length"] or 512
            self.int8: bool = said["int8"]
            self.pooling: str | None = said["pooling"]
            self.beyond_greedy: list[str] = said["beyond_greedy"]
            graphs: dict[str, str] = said["graphs"]
            self.exits: list[int] = said.get("exits", [])
            self.pad, self.scale, self.bias = (said.get(name) for name in ("pad", "scale", "bias"))
            file = self.folder / "config.json"
            self.config = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise StoreError(f"{folder} was not written by layershare export --format onnx.") from None
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{file} is broken or of another version ({error}).", "Export again.") from None
        self.sessions = {name: open_session(self.folder / part, threads) for name, part in graphs.items()}
        self.threshold: float | None = None
        self._tokenizer: Any = None

    def __call__(self, graph: str | None = None, /, **arrays: np.ndarray) -> Arrays:
        """Run one graph (default: the first) on arrays by name; what it has no input for is left out."""
        session = self.sessions[graph] if graph else next(iter(self.sessions.values()))
        known = {one.name: TYPES[one.type] for one in session.get_inputs()}
        outputs = [one.name for one in session.get_outputs()]
        if self.exits and self.threshold is not None:
            known["threshold"] = np.float32
            arrays["threshold"] = np.array(self.threshold)
        read = {name: np.asarray(array, known[name]) for name, array in arrays.items() if name in known}
        found = session.run(outputs, read)
        return dict(zip(outputs, found, strict=True))

    def encode(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        """Embeddings [N, d] of unit length: the last hidden states of each text, pooled as the model's folder says:
        their mean (the default), the largest value of each dimension, or the first or last token's. Of a dual encoder:
        what its tower for texts gives.

        Raises OptionError if the model has no embeddings, or pools in a way that is not computed here.
        """
        if self.kind == DUAL:
            return self._over(texts, batch_size, lambda out, _: out["text_embeds"])
        self._require("last_hidden_state", "embeddings", 3)
        if self.pooling not in POOLINGS:
            raise OptionError(
                f"{self.folder} pools its tokens, or goes on behind the pooling (see its modules.json), in a way "
                "that layershare does not compute.",
                "Run the graph and pool its states.",
            )
        pooled = POOLINGS[self.pooling]

        def pool(out: Arrays, mask: np.ndarray) -> np.ndarray:
            found = pooled(out["last_hidden_state"], mask.astype(np.float32))
            return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)

        return self._over(texts, batch_size, pool)

    def encode_images(self, read: Mapping[str, np.ndarray]) -> np.ndarray:
        """Embeddings [N, d] of unit length of images, as the processor beside the graphs makes them: ``pixel_values``
        [N, channels, height, width]. Raises OptionError if the model does not read images and texts side by side."""
        if self.kind != DUAL:
            raise OptionError(f"{self.folder} is of the kind {self.kind}: it embeds no images.")
        return self("image", **read)["image_embeds"]

    def match(self, read: Mapping[str, np.ndarray], texts: Sequence[str]) -> np.ndarray:
        """Logits [images, texts] of which text belongs to an image, by a dual encoder: CLIP (Radford et al., 2021,
        2103.00020) means their softmax over the texts, SigLIP (Zhai et al., 2023, 2303.15343) the sigmoid of each."""
        return self.encode_images(read) @ self.encode(texts).T * self.scale + self.bias

    def logits(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        """Unnormalised scores [N, classes] of a classification head."""
        self._require("logits", "labels", 2)
        return self._over(texts, batch_size, lambda out, _: out["logits"])

    def classify(self, texts: Sequence[str], *, batch_size: int = 32) -> list[tuple[str, float]]:
        """The label of each text and its probability."""
        scores = self.logits(texts, batch_size=batch_size)
        odds = np.exp(scores - scores.max(-1, keepdims=True))
        odds /= odds.sum(-1, keepdims=True)
        names = self.config.get("id2label") or {}
        best = odds.argmax(-1)
        return [(names.get(str(i), str(i)), float(row[i])) for i, row in zip(best, odds, strict=True)]

    def generate(self, texts: Sequence[str], *, max_new_tokens: int = 20) -> list[str]:
        """What follows each text, or what an encoder-decoder makes of it: greedily, to the end token at most.

        Plain greedy search: of the model's generation config only the start and end tokens and those that are never to
        be said count. Raises OptionError where that config asks for more, since the texts would be others.
        """
        if self.beyond_greedy:
            raise OptionError(
                f"{self.folder}: the model's generation config sets {', '.join(self.beyond_greedy)}, which plain "
                "greedy search does not follow.",
                "generate_ids searches without it; steps gives the scores to search in your own way.",
            )
        tokens = self.tokenize(texts, left=self.kind == "decoder")
        found = self.generate_ids(tokens, max_new_tokens=max_new_tokens)
        return [self.tokenizer.decode(list(row)) for row in found]

    def generate_ids(
        self, read: Mapping[str, np.ndarray], *, max_new_tokens: int, start: Sequence[int] = ()
    ) -> np.ndarray:
        """New token ids [N, at most max_new_tokens], greedily; behind an end token the rows go on with it.

        read: what the model reads, by name: ``input_ids`` and ``attention_mask`` [N, T], the prompts of a decoder
        padded on the left; or ``input_features``, ``input_values`` or ``pixel_values``, as the processor beside the
        graphs makes them. start: tokens that the decoder of an encoder-decoder begins with, as Whisper's language;
        default: what the model's generation config says.
        """
        self._require_generator()
        return decode(self, read, max_new_tokens, start)

    def steps(
        self, read: Mapping[str, np.ndarray], *, start: Sequence[int] = ()
    ) -> Generator[np.ndarray, np.ndarray, None]:
        """A generator of the logits [N, vocabulary] of each next token; ``send`` it the tokens [N] that you choose.
        ``read``, ``start``: as for :meth:`generate_ids`."""
        self._require_generator()
        return steps(self, read, start)

    def tokenize(self, texts: Sequence[str], *, left: bool = False) -> Arrays:
        """Padded ``input_ids``, ``attention_mask`` and ``token_type_ids``, each [N, T]."""
        rows = self.tokenizer.encode_batch(list(texts))
        width = max((len(row.ids) for row in rows), default=0)
        if self.kind == DUAL and "attention_mask" not in self._reads():
            width = self.limit  # it takes padding for text, and was trained with texts of this length

        def padded(values: Sequence[Sequence[int]], fill: int) -> np.ndarray:
            gaps = [[fill] * (width - len(row)) for row in values]
            joined = [[*g, *v] if left else [*v, *g] for v, g in zip(values, gaps, strict=True)]
            return np.array(joined, dtype=np.int64)

        pad = self.config.get("pad_token_id") if self.pad is None else self.pad
        return {
            "input_ids": padded([row.ids for row in rows], pad or 0),
            "attention_mask": padded([row.attention_mask for row in rows], 0),
            "token_type_ids": padded([row.type_ids for row in rows], 0),
        }

    @property
    def tokenizer(self) -> Any:
        """The ``tokenizers.Tokenizer`` beside the graphs, without padding."""
        if self._tokenizer is None:
            try:
                from tokenizers import Tokenizer
            except ImportError as error:
                raise DependencyError(
                    "texts need the package tokenizers.", "pip install tokenizers"
                ) from error
            file = self.folder / "tokenizer.json"
            if not file.is_file():
                raise ModelError(
                    f"{self.folder} has no tokenizer.json.", "Call the runner with arrays of token ids."
                )
            self._tokenizer = Tokenizer.from_file(str(file))
            self._tokenizer.no_padding()
            self._tokenizer.enable_truncation(self.limit)
        return self._tokenizer

    def _over(self, texts: Sequence[str], batch_size: int, read: Any) -> np.ndarray:
        """``read`` of every text's outputs, in the order given; texts of like length go together."""
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        rows: list[Any] = [None] * len(texts)
        for first in range(0, len(order), batch_size):
            some = order[first : first + batch_size]
            batch = self.tokenize([texts[i] for i in some])
            for i, row in zip(some, read(self(**batch), batch["attention_mask"]), strict=True):
                rows[i] = row
        return np.array(rows)

    def _reads(self) -> set[str]:
        return {one.name for one in next(iter(self.sessions.values())).get_inputs()}

    def _require_generator(self) -> None:
        if self.kind not in ("decoder", "encoder-decoder"):
            raise OptionError(f"{self.folder} is of the kind {self.kind}: it generates nothing.")

    def _require(self, output: str, what: str, rank: int) -> None:
        """Raise OptionError unless the graph gives ``output`` with so many axes."""
        first = next(iter(self.sessions.values())).get_outputs()[0]
        if self.kind != "encoder" or (first.name, len(first.shape)) != (output, rank):
            raise OptionError(
                f"{self.folder} gives {first.name} {first.shape} ({self.kind}): it has no {what}."
            )
