"""Pretraining: a language model from a config or a checkpoint and running text, shared from the start or not."""

from layershare.pretrain.run import PretrainConfig, pretrain

__all__ = ["PretrainConfig", "pretrain"]
