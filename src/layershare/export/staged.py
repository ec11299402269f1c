"""Exits in an ONNX graph: one ``If`` inside the other, so that what lies behind an exit runs only where it is needed.

A subgraph reads what the graphs around it have computed, and their initialisers: all weights stay where they are, once.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from layershare.exits.model import EarlyExit

STAGE, LOGITS, EXIT, THRESHOLD = "exit.{}", "logits", "exit", "threshold"


class Stages(nn.Module):
    """A classifier that gives the logits of every exit beside its own: ``exit.POSITION``, ``logits``."""

    def __init__(self, early: EarlyExit) -> None:
        super().__init__()
        self.model, self.heads = early.model, early.heads
        self.tail = early.tail

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        out = self.model(**inputs, output_hidden_states=True)
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
        said = {}
        heads: Mapping[str, Any] = dict(self.heads.items())
        for position, head in heads.items():
            pooled = self.tail.pooled(out.hidden_states[int(position) + 1], mask, head.pooling)
            said[STAGE.format(position)] = head(pooled)
        return said | {LOGITS: out.logits}


def nest(model: ir.Model, threshold: float) -> None:
    """Put everything behind each exit into a branch, in place.

    The graph then has the outputs ``logits`` and ``exit`` (the last position that ran; -1: all), and an input
    ``threshold`` that may be left out. A batch leaves when all of its texts are sure.
    """
    graph = model.graph
    outputs = {str(value.name): value for value in graph.outputs}
    stages = [name for name in outputs if name != LOGITS]
    stages.sort(key=lambda name: int(name.rpartition(".")[2]))
    ends = [outputs[name] for name in (*stages, LOGITS)]
    first = _first_needed(ends)
    groups: list[list[ir.Node]] = [[] for _ in ends]
    for node in graph:
        groups[first[node]].append(node)
    graph.outputs.clear()
    for node in reversed([node for group in groups[1:] for node in group]):
        graph.remove(node)
    limit = ir.val(THRESHOLD, const_value=ir.tensor(np.array(threshold, np.float32), name=THRESHOLD))
    limit.shape, limit.type = ir.Shape([]), ir.TensorType(ir.DataType.FLOAT)
    graph.initializers[THRESHOLD] = limit
    graph.inputs.append(limit)
    positions = [int(name.rpartition(".")[2]) for name in stages]
    ends[-1].name = f"{LOGITS}.end"
    made, nodes = _rest(groups, ends, positions, 0, limit)
    made[0].name, made[1].name = LOGITS, EXIT
    graph.extend(nodes)
    graph.outputs.extend(made)


def _first_needed(ends: Iterable[ir.Value]) -> Mapping[ir.Node, int]:
    """Node -> the first of these values that depends on it."""
    found: dict[ir.Node, int] = {}
    for stage, value in enumerate(ends):
        todo = [value.producer()]
        while todo:
            node = todo.pop()
            if node is not None and node not in found:
                found[node] = stage
                todo += [given.producer() for given in node.inputs if given is not None]
    return found


def _rest(
    groups: list[list[ir.Node]], ends: list[ir.Value], positions: list[int], stage: int, limit: ir.Value
) -> tuple[list[ir.Value], list[ir.Node]]:
    """What follows the nodes of a stage: (logits and exit, nodes). Where the exit is sure its answer, else the rest."""
    if stage == len(positions):
        return _answer(ends, -1, stage)
    then, leave = _answer(ends, positions[stage], stage)
    outputs, nodes = _rest(groups, ends, positions, stage + 1, limit)
    branches = {
        "then_branch": ir.Graph([], then, nodes=leave, name=f"leave.{stage}"),
        "else_branch": ir.Graph([], outputs, nodes=[*groups[stage + 1], *nodes], name=f"go_on.{stage}"),
    }
    axes = _node("Constant", [], stage, value=ir.tensor(np.array([-1], np.int64)))
    odds = _node("Softmax", [ends[stage]], stage, axis=-1)
    best = _node("ReduceMax", [odds.outputs[0], axes.outputs[0]], stage, keepdims=0)
    least = _node("ReduceMin", [best.outputs[0]], stage, keepdims=0)
    sure = _node("GreaterOrEqual", [least.outputs[0], limit], stage)
    fork = ir.node("If", [sure.outputs[0]], branches, num_outputs=2, name=f"If.{stage}")
    _typed(fork.outputs, ends[-1], f"fork.{stage}")
    return list(fork.outputs), [axes, odds, best, least, sure, fork]


def _answer(ends: list[ir.Value], position: int, stage: int) -> tuple[list[ir.Value], list[ir.Node]]:
    logits = _node("Identity", [ends[stage]], stage)
    place = _node("Constant", [], f"{stage}.place", value=ir.tensor(np.array(position, np.int64)))
    made = [logits.outputs[0], place.outputs[0]]
    _typed(made, ends[-1], f"answer.{stage}")
    return made, [logits, place]


def _node(kind: str, inputs: list[ir.Value], where: object, **attributes: Any) -> ir.Node:
    made = ir.node(kind, inputs, attributes)
    made.outputs[0].name = f"{kind}.{where}"
    return made


def _typed(outputs: Sequence[ir.Value], like: ir.Value, name: str) -> None:
    logits, place = outputs
    logits.name, logits.shape, logits.type = f"{name}.{LOGITS}", like.shape, like.type
    place.name, place.shape, place.type = f"{name}.{EXIT}", ir.Shape([]), ir.TensorType(ir.DataType.INT64)
