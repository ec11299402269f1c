"""Sharing a checkpoint larger than memory: from file to file, one parameter of one group at a time.

The model is opened and shared as always, but on the meta device, where no weight is. What ``share`` computes is then
computed from tensors that are read when their turn comes, and goes to its place in the files at once.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming, rename_source_key, revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from layershare.errors import ModelError
from layershare.linear import GATE
from layershare.plan import SharingPlan
from layershare.sharing.convert import begin, finish, in_original
from layershare.sharing.moments import Moments
from layershare.sharing.solve import solve
from layershare.store.shards import SHARD_SIZE, Shards

OTHERWISE = "Share it without --stream."
AHEAD = 2**28  # bytes that the disk is asked for before they are needed
Span = tuple[Path, int, int]


def share_stream(
    model: PreTrainedModel, plan: SharingPlan, source: Path, folder: Path, *, max_shard_size: int | str = SHARD_SIZE
) -> PreTrainedModel:  # fmt: skip
    """Share the checkpoint in ``source`` into ``folder``: the files that ``share`` and ``save_pretrained`` would write.

    model: ``source`` opened by :func:`layershare.store.open.outline`. Returns the student, on the meta device.
    Raises PlanError as :func:`layershare.share` does without calibration, and ModelError where the checkpoint's tensors
    are not, one by one, the parameters of the model.
    """
    tensors = Source(model, source)
    student, layout = begin(model, plan, calibrated=False)
    finish(student, layout, plan, whitened=False)
    original = in_original(model, plan)
    names = _saved_names(student)
    student.save_pretrained(folder, state_dict={})  # the configs alone
    state, stored = student.state_dict(), student.num_parameters()
    with (
        Shards(folder, {names[name]: state[name] for name in names}, stored, max_shard_size) as shards,
        torch.no_grad(),
    ):
        tensors.expect(original(name) for job in layout.jobs for name in job.names)
        for values in solve(layout, lambda name: tensors.read(original(name)), Moments()):
            for name in list(values):
                shards.put(names.pop(name), values.pop(name))
        for layer, gate in layout.gates:
            name = f"{layer}.{GATE}"
            shards.put(names.pop(name), torch.full_like(state[name], gate.value, device="cpu"))
        tensors.expect(map(original, names))
        for name, saved in names.items():
            shards.put(saved, tensors.read(original(name)))
    return student


class Source:
    """The tensors of a checkpoint by their names in ``model``, in the model's precision, read when asked for.

    They are views of the files: what is not touched is not read, and what is forgotten takes no memory. Ties in
    ``model`` what is the same in the checkpoint. Raises ModelError where names do not match one to one.
    """

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self.spans = {name: span for file in _files(folder) for name, span in _spans(file)}
        self.places = _places(model, folder, self.spans)
        self.kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        self.coming: Iterator[str] = iter(())
        self.asked = 0
        # What the model ties a checkpoint may hold twice. Loading looks if it is the same, which it cannot do here.
        for member, owner in model.all_tied_weights_keys.items():
            apart = self.places[member] != self.places[owner]
            if apart and not torch.equal(self.read(member), self.read(owner)):
                raise ModelError(
                    f"{folder} has its own {member}, which its config ties to {owner}.", OTHERWISE
                )
        model.tie_weights(recompute_mapping=False)

    def expect(self, names: Iterable[str]) -> None:
        """Say what will be read, in order: the disk is asked for some of it ahead, to be waited for less."""
        self.coming, self.asked = iter(names), 0

    def read(self, name: str) -> Tensor:
        place = self.places[name]
        file, start, end = self.spans[place]
        self.asked -= end - start
        while self.asked < AHEAD and (coming := next(self.coming, None)) is not None:
            self.asked += _ask_for(*self.spans[self.places[coming]])
        # Opened for each tensor: an open file would keep in memory all that was read of it.
        with safe_open(file, "pt") as tensors:
            return tensors.get_tensor(place).to(self.kinds[name])


def _files(source: Path) -> list[Path]:
    if (single := source / SAFE_WEIGHTS_NAME).is_file():
        return [single]
    index = json.loads((source / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
    return [source / name for name in sorted(set(index["weight_map"].values()))]


def _spans(file: Path) -> Iterator[tuple[str, Span]]:
    """Where each tensor of a file stands in it. transformers has opened the file before, so it is a sound one."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    for name, tensor in header.items():
        if name != "__metadata__":
            start, end = tensor["data_offsets"]
            yield name, (file, 8 + length + start, 8 + length + end)


def _ask_for(file: Path, start: int, end: int) -> int:
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)
    return end - start


def _places(model: PreTrainedModel, source: Path, names: Mapping[str, object]) -> dict[str, str]:
    """The name in the checkpoint of each tensor of the model. transformers may know them by other names, and then it
    renames; what it makes of several tensors is refused."""
    conversions: list[Any] = model._weight_conversions  # type: ignore[assignment]
    prefix, state = model.base_model_prefix, model.state_dict()
    if any(not isinstance(one, WeightRenaming) for one in conversions):
        raise ModelError(
            f"{source}: tensors of this checkpoint are joined or cut when it is loaded.", OTHERWISE
        )
    places: dict[str, str] = {}
    for name in names:
        renamed, _ = rename_source_key(name, conversions, [], prefix, state)
        if renamed not in state and name in state:
            renamed = name
        if renamed in state and places.setdefault(renamed, name) != name:
            raise ModelError(f"{source} has {renamed} twice, also as {name}.", OTHERWISE)
    parameters = {name: model.get_parameter_or_buffer(name) for name in state}
    owners = {id(parameters[name]): name for name in places}
    for name, parameter in parameters.items():
        if id(parameter) not in owners:
            raise ModelError(f"{source} has no tensor for {name} alone.", OTHERWISE)
        places.setdefault(name, places[owners[id(parameter)]])
    return places


def _saved_names(model: PreTrainedModel) -> dict[str, str]:
    """The name under which ``save_pretrained`` writes each tensor that it writes."""
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in (model._keys_to_ignore_on_save or ())
    }
    names = {id(tensor): name for name, tensor in state.items()}
    kept = revert_weight_conversion(model, remove_tied_weights_from_state_dict(dict(state), model))
    if any(id(tensor) not in names for tensor in kept.values()):
        raise ModelError(f"{type(model).__name__}: tensors are joined or cut when it is saved.", OTHERWISE)
    return {names[id(tensor)]: name for name, tensor in kept.items()}
