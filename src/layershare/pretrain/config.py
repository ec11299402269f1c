"""How to pretrain, as typed settings."""

from typing import Literal

from pydantic import Field

from layershare.train import TrainConfig

VOCABULARY = 8192
"""Tokens of a tokenizer that is trained, where nobody says how many."""


class PretrainConfig(TrainConfig):
    """How to pretrain: the fields of :class:`~layershare.train.TrainConfig` (a text is a block), and what to guess."""

    steps: int = Field(1000, ge=1, description="Optimizer steps.")
    batch_size: int = Field(32, ge=1, description="Blocks a step, over all devices together.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak of the learning rate (AdamW).")
    schedule: Literal["linear", "cosine"] = Field("cosine", description="How it falls to 0 after that.")
    adam_beta2: float = Field(0.98, gt=0, lt=1, description="Memory of squared gradients (AdamW).")
    objective: Literal["auto", "masked", "causal", "span"] = Field(
        "auto", description="masked tokens, the next token, left-out spans; auto: what suits the model."
    )
    block_size: int = Field(128, ge=8, description="Tokens in a block of packed text.")
    vocabulary: int = Field(
        0,
        ge=0,
        description="Tokens to train when no tokenizer is given; 0: the config's vocab_size, else 8192.",
    )
    rate: float = Field(0.15, gt=0, lt=1, description="Share of tokens that are masked or left out.")
    mean_span: float = Field(3.0, ge=1, description="Mean length of a left-out span.")
    separate: bool = Field(False, description="Keep attention inside each document (causal models).")
    held_out: float = Field(
        0.05, gt=0, lt=0.5, description="Share of the documents to judge on, without a file."
    )
    judged_blocks: int = Field(256, ge=1, description="At most so many held-out blocks are judged.")
    dropout: bool = Field(True, description="Whether the model trains with its dropout.")
