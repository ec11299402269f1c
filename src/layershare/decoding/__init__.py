"""Decoding with a draft that is made of the model itself."""

from layershare.decoding.choose import Draft, choose_draft
from layershare.decoding.speculative import Speculative, speculative
from layershare.decoding.view import draft_view

__all__ = ["Draft", "Speculative", "choose_draft", "draft_view", "speculative"]
