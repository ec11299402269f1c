"""Pretraining: a language model from a config or a checkpoint and running text, shared from the start or not."""

from layershare.pretrain.config import PretrainConfig
from layershare.pretrain.run import pretrain

__all__ = ["PretrainConfig", "pretrain"]
