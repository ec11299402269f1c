"""Graphs in which every weight is stored once, and the count that proves it.  Works on ``onnx_ir`` models, in place.

An exporter writes a shared parameter once, but leaves a transpose before each of its uses. ONNX Runtime folds those
when it loads the graph, into one copy a use. So weights are transposed here, once, before any use.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

MATRIX = 256
"""Elements from which a matrix counts as a weight; below that it is a constant of the graph."""
SINGLE_FILE = 1_500_000_000
"""Bytes of weights from which they go beside the graph: no graph of 2 GB can be read."""
DATA = "model.onnx_data"


def tidy(model: ir.Model) -> None:
    """Transpose weights once for all uses, then keep equal tensors once and drop unused ones."""
    for value in list(model.graph.initializers.values()):
        if value.const_value is not None and value.const_value.shape.rank() == 2:
            _turn(model.graph, value)
    common.DeduplicateInitializersPass(size_limit=2**62)(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)  # stack traces, larger than a small model


def weights(model: ir.Model) -> list[ir.Value]:
    """The initialisers that hold numbers of the model; each has its tensor in ``const_value``."""
    return [value for value in model.graph.initializers.values() if value.const_value is not None]


def products(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Each matrix product with a constant right side, float or int8, and that side."""
    constant = {id(value) for value in weights(model)}
    for node in model.graph.all_nodes():
        if node.op_type in ("MatMul", "Gemm", "MatMulInteger", "MatMulIntegerToFloat"):
            right = node.inputs[1]
            if right is not None and id(right) in constant and size(right) >= MATRIX:
                yield node, right


def shared(models: Iterable[ir.Model]) -> int:
    """Products whose weight serves others too, in any of these graphs that keep their weights together."""
    rights = [right for model in models for _, right in products(model)]
    keys = {right: _key(right.const_value) for right in set(rights) if right.const_value is not None}
    return sum(n for n in Counter(keys[right] for right in rights).values() if n > 1)


def size(value: ir.Value) -> int:
    """Elements of an initialiser."""
    assert value.const_value is not None
    return value.const_value.size


def stored(models: Iterable[ir.Model], least: int = 0) -> int:
    """Bytes of all different tensors of at least ``least`` elements in graphs that keep their weights together."""
    tensors = (value.const_value for model in models for value in weights(model) if size(value) >= least)
    return sum({_key(tensor): tensor.nbytes for tensor in tensors if tensor is not None}.values())


def save(models: Mapping[str, ir.Model], folder: Path) -> dict[str, str]:
    """Write the graphs; returns their file names. Several graphs, or large ones, keep their weights in one file."""
    files = {name: f"{name}.onnx" for name in models}
    if len(models) > 1 or stored(models.values()) > SINGLE_FILE:
        _move_out(models.values(), folder / DATA)
    for name, model in models.items():
        ir.save(model, folder / files[name])
    return files


def _move_out(models: Iterable[ir.Model], file: Path) -> None:
    """Write each different tensor once to ``file`` and let the graphs point there. Pages stay whole, for mapping."""
    places: dict[tuple, int] = {}
    with file.open("wb") as stream:
        for value in (value for model in models for value in weights(model) if size(value) >= MATRIX):
            tensor = value.const_value
            assert tensor is not None
            if (known := _key(tensor)) not in places:
                stream.write(bytes(-stream.tell() % 4096))
                places[known] = stream.tell()
                stream.write(tensor.tobytes())
            value.const_value = ir.ExternalTensor(
                file.name, places[known], tensor.nbytes, tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()), name=value.name or "", base_dir=file.parent,
            )  # fmt: skip


def _key(tensor: ir.TensorProtocol) -> tuple:
    """Equal for tensors of equal type, shape and content."""
    return tensor.dtype, tuple(tensor.shape.numpy()), hashlib.sha256(tensor.tobytes()).digest()


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new initialiser."""
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.initializers[name] = value
    return value


def before(
    node: ir.Node, op_type: str, inputs: list[ir.Value | None], domain: str = "", **attributes: Any
) -> ir.Value:
    """The output of a new node in front of ``node``."""
    made = ir.node(op_type, inputs, attributes=attributes, domain=domain)
    assert node.graph is not None
    node.graph.insert_before(node, made)
    return made.outputs[0]


def replace(node: ir.Node, new: ir.Value) -> None:
    """``new`` in place of the first output of ``node``, which goes away."""
    old = node.outputs[0]
    new.name, new.shape, new.type = old.name, old.shape, old.type
    old.name = f"{old.name}_replaced"
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    assert node.graph is not None
    node.graph.remove(node, safe=True)


def _turn(graph: ir.Graph, value: ir.Value) -> None:
    """Store ``value`` transposed where that is how products read it; a lookup in the same table reads columns then."""
    uses = list(value.uses())
    turned = [(node, i) for node, i in uses if _transposes(node, i)]
    rest = [use for use in uses if use not in turned]
    if not turned or value.is_graph_output():
        return
    assert value.const_value is not None
    other = constant(graph, f"{value.name}.T", np.ascontiguousarray(value.const_value.numpy().T))
    for node, index in turned:
        if node.op_type == "Transpose":
            node.outputs[0].replace_all_uses_with(other)
            graph.remove(node, safe=True)
        else:
            node.attributes["transB"] = ir.AttrInt64("transB", 0)
            node.replace_input_with(index, other)
    if all(_looks_up(node, i) for node, i in rest):
        for node, _ in rest:
            columns = before(node, "Gather", [other, node.inputs[1]], axis=1)
            rank = node.inputs[1].shape.rank()  # type: ignore[union-attr]
            replace(node, before(node, "Transpose", [columns], perm=[*range(1, rank + 1), 0]))


def _transposes(node: ir.Node, index: int) -> bool:
    if node.op_type == "Transpose":
        return list(node.attributes["perm"].as_ints()) == [1, 0] and not node.outputs[0].is_graph_output()
    return node.op_type == "Gemm" and index == 1 and attribute(node, "transB", 0) == 1


def _looks_up(node: ir.Node, index: int) -> bool:
    known = node.op_type == "Gather" and node.inputs[1] is not None and node.inputs[1].shape is not None
    return known and index == 0 and attribute(node, "axis", 0) == 0


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """The value of an attribute, or its default."""
    return node.attributes[name].value if name in node.attributes else default
