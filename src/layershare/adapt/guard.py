"""What layershare adds to PEFT as soon as both are imported: its method, and three checks.

PEFT's ``merge_and_unload`` and ``merge_adapter`` add the delta of every position to the one tensor that the positions
share, and lose the delta of a factored map, whose weight is computed; both silently. Nothing on the side of the model
can stop that, since PEFT writes to ``weight.data``. So the one method in which PEFT itself asks whether it may merge is
wrapped, for all its tuners at once (and the merge of mixed adapters, which does not ask): it now refuses when a weight
that it would write to has more than one place. All else merges as before. (``merge()`` called on a single tuner layer
by hand is not covered.)

``save_pretrained`` and ``load_adapter`` are wrapped to write and check the record of the base, for adapters that
:func:`layershare.adapt.adapt` made; PEFT's config classes have no place for it.
"""

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from layershare.adapt import base
from layershare.errors import TieError
from layershare.linear import FactoredLinear

ATTRIBUTE = "layershare_base"
"""Where a PEFT config object keeps the record. It is no field, so it is not written to adapter_config.json."""


def install() -> None:
    """Register the method and wrap the functions, once."""
    from peft import PeftModel
    from peft.tuners.mixed import MixedModel
    from peft.tuners.tuners_utils import BaseTuner

    from layershare.adapt import bottleneck

    bottleneck.register()
    _wrap(BaseTuner, "_check_merge_allowed", _check_merge)
    _wrap(MixedModel, "_unload_and_optionally_merge", _merge_mixed)
    _wrap(PeftModel, "save_pretrained", _save)
    _wrap(PeftModel, "load_adapter", _load)


def tie_modules(model: Any, groups: list[list[str]], adapter: str) -> None:
    """Give the tuner layers of each group (names in the base) the adapter modules of its first one."""
    layers = dict(model.get_base_model().named_modules())
    for first, *others in groups:
        for other in others:
            for name in layers[first].adapter_layer_names:
                if adapter in (mine := getattr(layers[first], name)):
                    getattr(layers[other], name)[adapter] = mine[adapter]


def refuse_shared(model: nn.Module) -> None:
    """Raise TieError if merging would write to a tensor with more than one place, or to one that is computed."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    every = list(model.named_parameters(remove_duplicate=False))
    places = Counter(id(parameter) for _, parameter in every)
    hint = "Use layershare.adapt.merge(model): it merges into an unshared copy."
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or isinstance(
            inside := layer.get_base_layer(), nn.Embedding
        ):
            continue
        if isinstance(inside, FactoredLinear):
            raise TieError(
                f"{name} is a factored map: PEFT would lose the delta, as its weight is computed.", hint
            )
        if any(places[id(parameter)] > 1 for parameter in inside.parameters()):
            raise TieError(
                f"{name} shares its weight with other positions: PEFT would add the delta of every position to the "
                "one tensor, and the result would be wrong.",
                hint,
            )


def _check_merge(original: Callable, tuner: Any) -> Any:
    refuse_shared(tuner.model)
    base.own_memory(tuner.model)  # PEFT writes in place, and the model that was adapted has the same memory
    return original(tuner)


def _merge_mixed(original: Callable, tuner: Any, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
    """``PeftMixedModel`` merges in a way of its own, and does not ask."""
    if merge:
        refuse_shared(tuner.model)
    return original(tuner, merge, *args, **kwargs)


def _save(original: Callable, model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    original(model, save_directory, *args, **kwargs)
    main = kwargs.get("is_main_process", True)
    for name in kwargs.get("selected_adapters") or list(model.peft_config) if main else ():
        if (record := getattr(model.peft_config[name], ATTRIBUTE, None)) is not None:
            base.write(Path(save_directory) / ("" if name == "default" else name), record)


def _load(original: Callable, model: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    folder = Path(model_id) / (kwargs.get("subfolder") or "")
    record = base.read(folder)
    if record is not None:
        base.check(record, base.bare(model), str(folder))
    result = original(model, model_id, adapter_name, *args, **kwargs)
    if record is not None:
        setattr(model.peft_config[adapter_name], ATTRIBUTE, record)
        tie_modules(model, record.get("groups", []), adapter_name)
    return result


def _wrap(owner: type, name: str, around: Callable) -> None:
    original = getattr(owner, name)
    if not hasattr(original, "_by_layershare"):

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        wrapped._by_layershare = True  # type: ignore[attr-defined]
        setattr(owner, name, wrapped)
