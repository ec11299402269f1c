"""layershare: share the parameters of a pretrained Transformer across its layers, heal it, prove it, ship it."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from layershare._when import when_imported

if TYPE_CHECKING:
    from layershare.analyse.encode import encode
    from layershare.decoding import speculative
    from layershare.errors import LayershareError
    from layershare.plan import SharingPlan
    from layershare.result import Result
    from layershare.sharing import count, make_plan, plan_of, predict, retie, share, unshare, verify
    from layershare.stacks import find_stacks

# Loaded on first use, so that the command line can print its help without importing torch.
_HOMES = {
    "LayershareError": "errors",
    "Result": "result",
    "SharingPlan": "plan",
    "count": "sharing",
    "encode": "analyse.encode",
    "find_stacks": "stacks",
    "make_plan": "sharing",
    "plan_of": "sharing",
    "predict": "sharing",
    "retie": "sharing",
    "share": "sharing",
    "speculative": "decoding",
    "unshare": "sharing",
    "verify": "sharing",
}
__all__ = [
    "LayershareError",
    "Result",
    "SharingPlan",
    "count",
    "encode",
    "find_stacks",
    "make_plan",
    "plan_of",
    "predict",
    "retie",
    "share",
    "speculative",
    "unshare",
    "verify",
]

try:
    __version__ = version("layershare")
except PackageNotFoundError:
    __version__ = "0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'layershare' has no attribute {name!r}")
    return getattr(import_module(f"layershare.{_HOMES[name]}"), name)


# Every from_pretrained then loads shared folders; see layershare/store/hub.py.
when_imported("transformers.modeling_utils", lambda: import_module("layershare.store"))
# PEFT then knows our adapters, and refuses to merge into shared weights; see layershare/adapt/guard.py.
when_imported("peft", lambda: import_module("layershare.adapt.guard").install())
