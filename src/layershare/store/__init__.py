"""Shared models on disk."""

from layershare.store.hub import LayershareLoader

__all__ = ["LayershareLoader"]
