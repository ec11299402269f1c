"""Bottleneck adapters as a PEFT method: ``h + up(act(down(h)))`` behind a linear map.

``up`` starts at zero, so a new adapter changes nothing, exactly. PEFT is imported here at the top: only
import this file where PEFT is there.
"""

from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from layershare.errors import ModelError, TieError

NAME = "layershare_bottleneck"


@dataclass
class BottleneckConfig(PeftConfig):
    """What adapter_config.json keeps of bottleneck adapters."""

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Full names of the linear maps behind which the adapters stand."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    size: int = field(default=64, metadata={"help": "Inner width."})
    activation: str = field(
        default="relu", metadata={"help": "Nonlinearity inside, as transformers names it."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout inside."})
    groups: list[list[str]] = field(
        default_factory=list, metadata={"help": "Target modules that have one adapter together."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Heads, trained and saved in full."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[NAME.upper()]


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear map with an adapter behind it. Of a group only the first layer holds it, the others refer to it."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self._forms: dict[str, tuple[nn.Module, float]] = {}
        # Tuples hide the layer from torch, which would else store the adapter under every name.
        self._owners: dict[str, tuple[BottleneckLayer]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(
        self, name: str, config: BottleneckConfig, owner: "BottleneckLayer | None" = None
    ) -> None:
        """Give this layer the adapter ``name``: a new one, or the one of ``owner``."""
        if owner is not None:
            self._owners[name] = (owner,)
            return
        width = _out_features(self.base_layer)
        down, up = nn.Linear(width, config.size), nn.Linear(config.size, width)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.bottleneck_down[name], self.bottleneck_up[name] = down, up
        self._forms[name] = (ACT2FN[config.activation], config.dropout)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        h = self.base_layer(x, *args, **kwargs)
        if not self.disable_adapters:
            for name in self.active_adapters:
                h = h + self._delta(h, name)
        return h

    def _delta(self, h: Tensor, name: str) -> Tensor | float:
        owner = self._owners[name][0] if name in self._owners else self
        if name not in owner.bottleneck_down:
            return 0.0
        down, up = owner.bottleneck_down[name], owner.bottleneck_up[name]
        activation, dropout = owner._forms[name]
        inner = activation(down(h.to(down.weight.dtype)))  # type: ignore[arg-type]
        return up(nn.functional.dropout(inner, dropout, self.training)).to(h.dtype)


class BottleneckModel(BaseTuner):
    """Puts the layers in place."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - as PEFT declares it

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        layer = target if isinstance(target, BottleneckLayer) else BottleneckLayer(target)
        group = next((names for names in peft_config.groups if current_key in names), [current_key])
        first = group[0] != current_key and self.model.get_submodule(group[0])
        if first and not isinstance(first, BottleneckLayer):
            raise ModelError(
                f"{group[0]} comes after {current_key}, but should hold the adapter of their group."
            )
        layer.update_layer(adapter_name, peft_config, first or None)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        raise TieError(
            "a bottleneck adapter is not linear, so no weight can take it up.", "Keep it as it is."
        )


def register() -> None:
    """Make the method known to PEFT. It knows its methods by an enum that has no door for others: add the member."""
    name = NAME.upper()
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    register_peft_method(
        name=NAME, config_cls=BottleneckConfig, model_cls=BottleneckModel, prefix=BottleneckModel.prefix
    )


def _out_features(module: nn.Module) -> int:
    return int(module.nf if isinstance(module, Conv1D) else module.out_features)  # type: ignore[arg-type]
