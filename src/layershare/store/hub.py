"""The hub format: a shared model is a plain Hugging Face folder that stock ``AutoModel*`` classes load, tied.

The plan travels as ``quantization_config`` in config.json. Importing layershare registers a quantizer of that name,
whose one task is to give the empty model its shared structure before transformers loads the weights; after loading the
model is an ordinary one again (no quantized-model rules apply to it).

Without the import transformers would skip an unknown quantizer with a log line and initialise the missing weights at
random. So the config also names a weights file that does not exist (``transformers_weights``): stock code stops there,
with a message that says what to import. The quantizer takes that name away before files are looked up.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantizer

from layershare.errors import PlanError, StoreError
from layershare.linear import orders_of
from layershare.plan import SharingPlan
from layershare.sharing.carry import NAME, TRAP, LayershareConfig
from layershare.sharing.layout import present
from layershare.sharing.names import kept_conversions
from layershare.sharing.tie import install, layout_of, tie
from layershare.stacks import find_stacks
from layershare.store.files import check_files


@register_quantizer(NAME)
class LayershareLoader(HfQuantizer):
    """Hooks of ``from_pretrained``. It quantizes nothing."""

    requires_calibration = False

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        # The one hook that sees the config before the weights file is looked up.
        if getattr(config, "transformers_weights", None) == TRAP:
            del config.transformers_weights
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        assert isinstance(self.quantization_config, LayershareConfig)
        self.files = [Path(file) for file in checkpoint_files or ()]
        config = self.files[0].with_name("config.json") if self.files else "config.json"
        plan = SharingPlan.from_dict(self.quantization_config.plan, f"{config}: quantization_config.plan")
        if not plan.stacks and not plan.tables:
            raise StoreError(
                f"{config}: quantization_config has no plan.", "Save or download the model again."
            )
        self.where = (
            f"{self.files[0].parent if len(self.files) > 1 else self.files[0]}: " if self.files else ""
        )
        # A class may be half of what was saved, as T5EncoderModel.
        try:
            plan = present(find_stacks(model, [one.name for one in plan.stacks]), plan)
            self.layout = layout_of(model, plan)
        except PlanError as error:
            raise PlanError(f"{config}: {error.message}", error.hint) from None
        self.quantization_config.plan = plan.to_dict()
        self.known = [one.name for one in plan.stacks]
        install(model, self.layout)
        # transformers then neither allocates nor initialises the members of a tie, and ties them to their owners.
        self.members = {member: owner for owner, *members in self.layout.ties for member in members}
        self.stock_keys = model.all_tied_weights_keys
        model.all_tied_weights_keys = self.stock_keys | self.members
        # Meant for output embeddings, it would cut the biases of GPT-2's transposed maps to one side of their weight.
        model._adjust_bias = lambda *_: None  # type: ignore[method-assign]
        return model

    def update_weight_conversions(self, weight_conversions: list, model: PreTrainedModel) -> list:
        kept = kept_conversions(weight_conversions, self.layout)
        check_files(self.files, model, self.known, kept)
        return kept

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # It leaves untied, and takes off this list, what the checkpoint holds twice with different values.
        if apart := self.members.keys() - model.all_tied_weights_keys.keys():
            raise StoreError(
                f"{self.where}the checkpoint has its own {min(apart)}, which the plan in config.json ties.",
                "It was saved with another plan: save or download it again.",
            )
        model.all_tied_weights_keys = {
            k: o for k, o in model.all_tied_weights_keys.items() if k in self.stock_keys
        }
        del model._adjust_bias
        tie(model, self.layout)
        _refuse_incomplete(model, self.known, [table.modules[0] for table in self.layout.tables], self.where)
        model.is_quantized = False  # type: ignore[assignment]
        for module in model.modules():  # some layers compute otherwise where it is set
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
        del model.hf_quantizer, model.quantization_method
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _refuse_incomplete(model: nn.Module, known: Sequence[str], tables: Sequence[str], where: str) -> None:
    """transformers initialises what a checkpoint lacks and only logs it; of what is shared that is never meant."""
    stacks = tuple(f"{name}." for name in (*(stack.name for stack in find_stacks(model, known)), *tables))
    missing = [
        name
        for name, parameter in (*model.named_parameters(), *orders_of(model))
        if name.startswith(stacks) and not getattr(parameter, "_is_hf_initialized", False)
    ]
    if missing:
        raise StoreError(
            f"{where}the checkpoint lacks {missing[0]} and {len(missing) - 1} more of the layers' tensors.",
            "It is incomplete or was saved with another plan: save or download it again.",
        )
