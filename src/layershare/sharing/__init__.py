"""Sharing: from a plan to a model in which equal parameters are one object."""

# First, because its import brings in layershare.store, which needs this room: see layershare/__init__.py.
import transformers.modeling_utils  # noqa: F401

from layershare.sharing.carry import plan_of
from layershare.sharing.convert import share, unshare
from layershare.sharing.layout import Layout, resolve
from layershare.sharing.make import make_plan
from layershare.sharing.price import Prediction, predict
from layershare.sharing.tie import Account, Counts, count, retie, verify

__all__ = [
    "Account",
    "Counts",
    "Layout",
    "Prediction",
    "count",
    "make_plan",
    "plan_of",
    "predict",
    "resolve",
    "retie",
    "share",
    "unshare",
    "verify",
]
