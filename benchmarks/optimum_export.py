"""Run by benchmarks/peers.py with the Python of an environment that has optimum-onnx: export one model folder.

    VENV/bin/python benchmarks/optimum_export.py FOLDER OUT TASK

Equal parameters are one object before the export, as in the model that the folder was made from.
"""

import sys

import torch
from optimum.exporters.onnx import onnx_export_from_model
from transformers import AutoModel, AutoModelForCausalLM


def main(folder: str, out: str, task: str) -> None:
    kind = AutoModelForCausalLM if task.startswith("text-generation") else AutoModel
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    tied = tie_equal(model)
    onnx_export_from_model(model, out, task=task, do_validation=False)
    print(f"{tied} parameters tied")


def tie_equal(model: torch.nn.Module) -> int:
    """Make equal matrices one Parameter; returns how many went away."""
    owners: dict[tuple, torch.nn.Parameter] = {}
    tied = 0
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            key = (tuple(parameter.shape), float(parameter.double().sum()), float(parameter.flatten()[7]))
            owner = owners.setdefault(key, parameter)
            if owner is not parameter and torch.equal(owner, parameter):
                setattr(module, name, owner)
                tied += 1
    return tied


if __name__ == "__main__":
    main(*sys.argv[1:])
