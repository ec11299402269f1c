"""How to distil, as typed settings."""

from typing import Literal, Self

from pydantic import ConfigDict, Field, NonNegativeInt, model_validator

from layershare.config import Config
from layershare.train import TrainConfig


class LossWeights(Config):
    """The weight of each term of the loss; 0 leaves it out, and so does a task without such an output."""

    model_config = ConfigDict(allow_inf_nan=False)

    embedding: float = Field(10.0, ge=0, description="1 - cosine to the teacher's embedding.")
    similarity: float = Field(
        100.0, ge=0, description="Squared difference of the cosines between texts of a batch."
    )
    hidden: float = Field(
        1.0, ge=0, description="Squared error of hidden states, relative to the teacher's size."
    )
    logits: float = Field(1.0, ge=0, description="(KL T^2 + lambda_mse MSE) / 2 of the logits.")
    values: float = Field(
        5.0, ge=0, description="Error of boxes or pixels, relative to the size of the teacher's."
    )
    contrast: float = Field(
        1.0, ge=0, description="KL T^2 of which text of a batch belongs to an image, and the other way round."
    )
    labels: float = Field(
        0.0, ge=0, description="Cross-entropy with the true labels, where the data has any."
    )
    relation: float = Field(
        0.0,
        ge=0,
        description="KL of the query, key and value relations between tokens, in one layer (MiniLMv2).",
    )


class DistillConfig(TrainConfig):
    """How to distil: the fields of :class:`~layershare.train.TrainConfig`, and what is compared."""

    model_config = ConfigDict(allow_inf_nan=False)

    steps: int = Field(600, ge=1, description="Optimizer steps.")
    learning_rate: float = Field(
        1.5e-3,
        gt=0,
        description="Peak of the learning rate (AdamW). Lower where the steps are few: 5e-4 where little was lost, "
        "1e-4 where a pretrained model knows more than the training texts show.",
    )
    # In some hundred steps 0.999 would remember the warm-up to the end.
    adam_beta2: float = Field(0.98, gt=0, lt=1, description="Memory of squared gradients (AdamW).")
    max_length: int = Field(128, ge=4, description="Longer training texts are cut to this many tokens.")
    weights: LossWeights = LossWeights()
    temperature: float = Field(
        2.0, gt=0, le=100, description="T of the KL term; higher looks more at unlikely classes."
    )
    lambda_mse: float = Field(
        1.0,
        ge=0,
        description="Weight of the MSE of logits beside the KL; 0 where logits are large, as Whisper's, and it would "
        "drown the other terms.",
    )
    layer_map: tuple[tuple[NonNegativeInt, NonNegativeInt], ...] | None = Field(
        None,
        description="Whose hidden states are compared: pairs of a student and a teacher layer, from 0; "
        "default: as the sharing plan, or the two depths, say.",
    )
    top_k: int = Field(
        0, ge=0, description="Keep this many of the teacher's logits an entry, and the rest as one; 0: all."
    )
    relation_layer: int | None = Field(
        None,
        ge=0,
        description="Teacher layer of the relation term, from 0; default the last. The student's: its last.",
    )
    relation_heads: int = Field(
        0,
        ge=0,
        description="Pieces that queries, keys and values are cut into; 0: the teacher's attention heads.",
    )
    augment: float = Field(
        0.0, ge=0, lt=1, description="Chance of leaving out each token; the teacher then sees the same gaps."
    )
    dropout: bool = Field(False, description="Whether the student trains with its dropout.")
    local: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the steps, at the start, in which each layer reads the teacher's hidden states, so that "
        "it learns by itself.",
    )
    progressive: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the steps, after those of local, in which each layer is the teacher's by chance: at "
        "first half of the time, in the end never (module replacement).",
    )
    trained: Literal["all", "deltas"] = Field(
        "all",
        description="deltas: only what a position has beside what it shares, as corrections, private factors, gates.",
    )
    keep: Literal["best", "last"] = Field(
        "best",
        description="Which weights: the best by the task's metric on the validation split, those it begins with among "
        "them, or the last. Without such a split of at least 32 rows: the last.",
    )
    judge_every: int = Field(
        0,
        ge=0,
        description="Steps between judgements on the validation split; 0: before and at the end only.",
    )
    judge_rows: int = Field(
        512,
        ge=0,
        description="Choose on at most so many rows of the validation split, evenly spread; 0: all.",
    )
    train_embeddings: bool = Field(False, description="Whether embedding tables are trained too.")
    cache_mb: int = Field(
        4096,
        ge=0,
        description="Most that the teacher's outputs may take. In memory: else they are computed at each step; "
        "in a folder: else it is an error.",
    )
    cache_precision: Literal["float32", "float16"] = Field(
        "float32", description="float16 halves what the teacher's outputs take, and rounds them to 3 digits."
    )

    @model_validator(mode="after")
    def _phases_fit(self) -> Self:
        if self.local + self.progressive > 1:
            raise ValueError(
                f"local = {self.local:g} and progressive = {self.progressive:g} are more than all steps"
            )
        return self
