"""Sentence embeddings: tokens pooled as the model says, by their mean unless it does, and brought to unit length
(Reimers, Gurevych 2019, arXiv 1908.10084).

Three kinds of file: pairs with a score; pairs without one; single texts. Training needs no labels and uses
every different text. Evaluation is the Spearman correlation of cosine and score where there are scores, and
otherwise the ``agreement`` with the unshared model: the mean cosine between its embedding and the student's
of the same text.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from layershare.errors import DataError, ModelError
from layershare.tasks.encoding import batches, encode, usable_length
from layershare.tasks.files import number, text
from layershare.tasks.pooling import pooling_of
from layershare.tasks.reading import read_splits
from layershare.tasks.task import Data, Outputs, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor, nn

COLUMNS: dict[str, tuple[str, ...]] = {
    "text": (
        "text",
        "sentence",
        "sentence1",
        "sentence_1",
        "text1",
        "text_1",
        "s1",
        "anchor",
        "query",
        "question",
    ),
    "text_pair": (
        "text_pair",
        "sentence2",
        "sentence_2",
        "text2",
        "text_2",
        "s2",
        "positive",
        "passage",
        "answer",
    ),
    "score": ("score", "similarity", "similarity_score", "relatedness_score", "label"),
}


OPTIONAL = frozenset({"text_pair", "score"})
read = partial(
    read_splits,
    candidates=COLUMNS,
    optional=OPTIONAL,
    convert={"text": text, "text_pair": text, "score": number},
    together={"score": "text_pair"},
)
"""Reads pairs with or without score, or single texts."""


def texts(data: Data) -> list[str]:
    """The different training texts, both sides of the pairs, in file order."""
    return [] if data.train is None else unique_texts(data.train)


def unique_texts(dataset: "Dataset") -> list[str]:
    """The different texts of a split, both sides of the pairs, in order of first occurrence."""
    sides = [dataset[name][:] for name in ("text", "text_pair") if name in dataset.column_names]
    return list(dict.fromkeys(text for row in zip(*sides, strict=True) for text in row))


def encode_texts(
    tokenizer: Any,
    dataset: "Dataset",
    max_length: int,
    config: Any = None,  # noqa: ARG001 - the same call for every task
) -> "Dataset":
    """One row of token ids for each different text of the split."""
    from datasets import Dataset

    return Dataset.from_dict(encode(tokenizer, unique_texts(dataset), max_length))


def check(data: Data, config: Any) -> None:  # noqa: ARG001 - the same call for every task
    """Any encoder or decoder without a head will do, if its tokens are pooled in a way that is known."""
    pooling_of(config)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"A {config.model_type} model has an encoder and a decoder; its text embedding is not defined.",
            "Give an encoder, or the encoder of this model saved on its own.",
        )


def forward(model: "nn.Module", batch: "Mapping[str, Tensor]", *, hidden_states: bool = False) -> Outputs:
    """Embeddings [B, d] of a padded batch."""
    from accelerate.utils import extract_model_from_parallel  # type: ignore[import-untyped]
    from torch.nn.functional import normalize

    pool = pooling_of(extract_model_from_parallel(model).config)
    out = model(**batch, output_hidden_states=hidden_states)
    mask = batch["attention_mask"]
    return Outputs(
        normalize(pool(out.last_hidden_state, mask), dim=-1),
        None,
        out.hidden_states if hidden_states else (),
        mask,
    )


def embed(
    model: Any,
    tokenizer: Any,
    sentences: Sequence[str],
    *,
    batch_size: int = 64,
    max_length: int | None = None,
) -> "Tensor":
    """Embeddings [N, d] of texts, on the CPU in float32; no gradients; the model's mode is left as it was."""
    import torch

    encoded = encode(tokenizer, sentences, usable_length(tokenizer, model.config, max_length))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    result = None
    try:
        with torch.no_grad():
            for rows, batch in batches(tokenizer, encoded, batch_size):
                part = forward(model, {k: v.to(device) for k, v in batch.items()}).embedding
                assert part is not None
                if result is None:
                    result = torch.zeros(len(sentences), part.shape[1])
                result[rows] = part.float().cpu()
    finally:
        model.train(was_training)
    return torch.zeros(0, 0) if result is None else result


def evaluate(
    model: Any,
    tokenizer: Any,
    dataset: "Dataset",
    *,
    batch_size: int = 64,
    max_length: int | None = None,
    teacher: Any = None,
) -> dict[str, float]:
    """``spearman`` and ``pearson`` of cosine and score, given scores; ``agreement`` with a ``teacher``.

    Raises DataError when there are neither scores nor a teacher: nothing could be measured.
    """
    scored = "score" in dataset.column_names
    if not scored and teacher is None:
        raise DataError(
            "The test data has no scores, so quality can only be measured against the original model.",
            "Give pairs with a score column, or pass teacher=.",
        )
    sentences = unique_texts(dataset)
    options: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length}
    ours = embed(model, tokenizer, sentences, **options)
    figures = {}
    if scored:
        from scipy.stats import pearsonr, spearmanr

        row = {text: i for i, text in enumerate(sentences)}
        left, right = ([row[text] for text in dataset[side]] for side in ("text", "text_pair"))
        cosine = (ours[left] * ours[right]).sum(1).numpy()
        scores = dataset["score"][:]
        if len(scores) < 2 or len(set(scores)) < 2:
            raise DataError("The test data needs at least two rows with different scores for a correlation.")
        figures["spearman"] = float(spearmanr(cosine, scores).statistic)
        figures["pearson"] = float(pearsonr(cosine, scores).statistic)
    if teacher is not None:
        theirs = ours if teacher is model else embed(teacher, tokenizer, sentences, **options)
        figures["agreement"] = float((ours * theirs).sum(1).mean())
    return figures


def metric_of(dataset: "Dataset") -> str:
    """``spearman`` where there are scores, ``agreement`` otherwise."""
    return "spearman" if "score" in dataset.column_names else "agreement"


TASK = Task(
    name="sentence-embedding",
    auto_class="AutoModel",
    metric="spearman",
    higher_is_better=True,
    columns=COLUMNS,
    optional=OPTIONAL,
    read=read,
    encode=encode_texts,
    texts=texts,
    check=check,
    forward=forward,
    evaluate=evaluate,
    metric_of=metric_of,
    terms=("embedding", "similarity"),
)
