"""Exits: a classifier that answers behind an earlier layer where it is sure of it."""

from layershare.exits.config import ExitsConfig
from layershare.exits.model import EarlyExit, EarlyExitOutput
from layershare.exits.store import load

__all__ = ["EarlyExit", "EarlyExitOutput", "ExitsConfig", "load"]
