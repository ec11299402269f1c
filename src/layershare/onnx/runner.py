"""The runner of exported models: texts in, embeddings, labels or texts out."""

import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from layershare.errors import DependencyError, ModelError, OptionError, StoreError
from layershare.onnx.decoding import decode, steps
from layershare.onnx.session import open_session

MANIFEST = "layershare_onnx.json"
Arrays = dict[str, np.ndarray]


def load(folder: str | Path, *, threads: int | None = None) -> "Runner":
    """The exported model in ``folder``. ``threads``: compute threads of each operator; default: all cores.

    Raises StoreError if the folder is not an export, DependencyError without onnxruntime.
    """
    return Runner(folder, threads=threads)


class Runner:
    """An exported model.

    Attributes:
        kind: ``encoder``, ``decoder``, ``encoder-decoder`` or ``vision``.
        config: the model's config.json.
        sessions: the onnxruntime session of each graph, by name.
    """

    def __init__(self, folder: str | Path, *, threads: int | None = None) -> None:
        self.folder = Path(folder).expanduser()
        try:
            said = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            self.config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise StoreError(f"{folder} was not written by layershare export --format onnx.") from None
        self.kind: str = said["kind"]
        self.eos: list[int] = said["eos"]
        self.start: int | None = said["start"]
        self.limit: int = said["max_length"] or 512
        self.sessions = {
            name: open_session(self.folder / file, threads) for name, file in said["graphs"].items()
        }
        self._tokenizer: Any = None

    def __call__(self, graph: str | None = None, /, **arrays: np.ndarray) -> Arrays:
        """Run one graph (default: the first) on arrays by name; what it has no input for is left out."""
        session = self.sessions[graph] if graph else next(iter(self.sessions.values()))
        known = {one.name for one in session.get_inputs()}
        outputs = [one.name for one in session.get_outputs()]
        found = session.run(outputs, {name: array for name, array in arrays.items() if name in known})
        return dict(zip(outputs, found, strict=True))

    def encode(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        """Embeddings [N, d] of unit length: the mean of the last hidden states over the tokens of each text, or what
        the model's own ``1_Pooling`` names: mean, or the state of the first token."""
        self._require("last_hidden_state", "embeddings", 3)
        first = self._pooling() == "cls"

        def pool(out: Arrays, mask: np.ndarray) -> np.ndarray:
            states, weights = out["last_hidden_state"], mask[..., None].astype(np.float32)
            found = states[:, 0] if first else (states * weights).sum(1) / weights.sum(1)
            return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)

        return self._over(texts, batch_size, pool)

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
        """What follows each text, or what an encoder-decoder makes of it: greedily, to the end token at most."""
        tokens = self.tokenize(texts, left=self.kind == "decoder")
        found = self.generate_ids(**tokens, max_new_tokens=max_new_tokens)
        return [self.tokenizer.decode(list(row)) for row in found]

    def generate_ids(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, *, max_new_tokens: int, **_: Any
    ) -> np.ndarray:
        """New token ids [N, at most max_new_tokens], greedily; behind an end token the rows go on with it.

        Both arrays [N, T], the prompts of a decoder padded on the left.
        """
        self._require_generator()
        return decode(self, input_ids, attention_mask, max_new_tokens)

    def steps(
        self, input_ids: np.ndarray, attention_mask: np.ndarray
    ) -> Generator[np.ndarray, np.ndarray, None]:
        """A generator of the logits [N, vocabulary] of each next token; ``send`` it the tokens [N] that you choose."""
        self._require_generator()
        return steps(self, input_ids, attention_mask)

    def tokenize(self, texts: Sequence[str], *, left: bool = False) -> Arrays:
        """Padded ``input_ids``, ``attention_mask`` and ``token_type_ids``, each [N, T]."""
        rows = self.tokenizer.encode_batch(list(texts))
        width = max((len(row.ids) for row in rows), default=0)

        def padded(values: Sequence[Sequence[int]], fill: int) -> np.ndarray:
            gaps = [[fill] * (width - len(row)) for row in values]
            joined = [[*g, *v] if left else [*v, *g] for v, g in zip(values, gaps, strict=True)]
            return np.array(joined, dtype=np.int64)

        pad = self.config.get("pad_token_id")
        return {
            "input_ids": padded([row.ids for row in rows], pad if pad is not None else 0),
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

    def _pooling(self) -> str:
        file = self.folder / "1_Pooling" / "config.json"
        said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"pooling_mode": "mean"}
        modes = {"cls": said.get("pooling_mode_cls_token"), "mean": said.get("pooling_mode_mean_tokens")}
        found = said.get("pooling_mode") or next((mode for mode, on in modes.items() if on), None)
        if found not in modes:
            raise OptionError(
                f"{file}: only pooling by mean or cls is known.", "Run the graph and pool its states."
            )
        return found

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
