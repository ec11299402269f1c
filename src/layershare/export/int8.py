"""Dynamic int8: weights as bytes with one scale a column, activations quantised as they come.

Every product with a weight becomes ``MatMulIntegerToFloat`` on a tensor that ``DynamicQuantizeLinear`` has made bytes
of, once for all products that read it. Tables of embeddings are looked up as bytes. What is read in another way
(the kernel of a convolution) is stored as bytes and computed with as floats. All operators are ONNX Runtime's own.

``onnxruntime.quantization.quantize_dynamic`` is not used: where layers share weights it quantises nothing, without a
word, unless the graph was rewritten first, and a table that is also the output layer it would store twice.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from layershare.export.graph import MATRIX, attribute, before, constant, replace, size, weights

MICROSOFT = "com.microsoft"
Levels = dict[ir.Value, list[ir.Value]]
"""Of each activation its bytes, scale and zero. By the value itself: ids come again when values are freed."""


def quantize(model: ir.Model) -> None:
    """Quantise all weights of at least ``MATRIX`` elements, in place."""
    model.opset_imports[MICROSOFT] = 1
    activations: Levels = {}
    for value in weights(model):
        tensor = value.const_value
        assert tensor is not None
        if tensor.dtype != ir.DataType.FLOAT or tensor.shape.rank() < 2 or size(value) < MATRIX:
            continue
        uses = list(value.uses())
        if tensor.shape.rank() == 2 and all(_is_product(*use) for use in uses if not _looks_up(*use, axis=1)):
            _columns(model.graph, value, uses, activations)
        elif tensor.shape.rank() == 2 and all(_looks_up(*use, axis=0) for use in uses):
            _rows(model.graph, value, uses)
        else:
            _stored(model.graph, value, uses)
    RemoveUnusedNodesPass()(model)


def to_bytes(array: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 [like ``array``] and the scales of the slices along ``axis``, so that q * scale is near array."""
    others = tuple(i for i in range(array.ndim) if i != axis)
    top = np.abs(array).max(axis=others, keepdims=True)
    scale = np.where(top > 0, top / 127, 1).astype(np.float32)
    return np.rint(array / scale).astype(np.int8), scale


def _columns(graph: ir.Graph, value: ir.Value, uses: list, activations: Levels) -> None:
    quantized, scale = to_bytes(_array(value), axis=1)
    right, scales = (
        constant(graph, f"{value.name}.int8", quantized),
        constant(graph, f"{value.name}.scale", scale[0]),
    )
    for node, _ in uses:
        if node.op_type == "Gather":
            columns = before(node, "Gather", [right, node.inputs[1]], axis=1)
            _scaled(node, columns, before(node, "Gather", [scales, node.inputs[1]], axis=0))
            continue
        left, end, bias = node.inputs[0], node, None
        if node.op_type == "Gemm":
            bias = node.inputs[2] if len(node.inputs) > 2 else None
        elif (found := _bias_after(node, quantized.shape[1])) is not None:
            end, bias = found
        level, step, zero = activations.get(left) or _levels(graph, left, activations)
        inputs = [level, right, step, scales, zero, None, bias]
        replace(end, before(end, "MatMulIntegerToFloat", inputs, MICROSOFT))
        if end is not node:
            graph.remove(node, safe=True)


def _levels(graph: ir.Graph, left: ir.Value, activations: Levels) -> list[ir.Value]:
    """Bytes, scale and zero of an activation, computed once where it comes from."""
    made = ir.node("DynamicQuantizeLinear", [left], num_outputs=3)
    producer = left.producer()
    if producer is None:
        graph.insert_before(graph[0], made)
    else:
        graph.insert_after(producer, made)
    activations[left] = list(made.outputs)
    return activations[left]


def _bias_after(node: ir.Node, width: int) -> tuple[ir.Node, ir.Value] | None:
    """The addition of a constant row behind a product, if nothing else reads the product."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0][0].op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    add, index = uses[0]
    row = add.inputs[1 - index]
    if row is None or row.const_value is None or tuple(row.const_value.shape.numpy()) != (width,):
        return None
    return add, row


def _rows(graph: ir.Graph, value: ir.Value, uses: list) -> None:
    quantized, scale = to_bytes(_array(value), axis=0)
    table, scales = (
        constant(graph, f"{value.name}.int8", quantized),
        constant(graph, f"{value.name}.scale", scale),
    )
    for node, _ in uses:
        rows = before(node, "Gather", [table, node.inputs[1]], axis=0)
        _scaled(node, rows, before(node, "Gather", [scales, node.inputs[1]], axis=0))


def _scaled(node: ir.Node, level: ir.Value, scale: ir.Value) -> None:
    replace(node, before(node, "Mul", [before(node, "Cast", [level], to=ir.DataType.FLOAT), scale]))


def _stored(graph: ir.Graph, value: ir.Value, uses: list) -> None:
    quantized, scale = to_bytes(_array(value), axis=0)
    level, scales = (
        constant(graph, f"{value.name}.int8", quantized),
        constant(graph, f"{value.name}.scale", scale.ravel()),
    )
    for node, index in uses:
        node.replace_input_with(index, before(node, "DequantizeLinear", [level, scales], axis=0))


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


def _is_product(node: ir.Node, index: int) -> bool:
    if node.op_type == "MatMul":
        return index == 1
    plain = {"alpha": 1, "beta": 1, "transA": 0, "transB": 0}
    return node.op_type == "Gemm" and index == 1 and all(attribute(node, n, v) == v for n, v in plain.items())


def _looks_up(node: ir.Node, index: int, axis: int) -> bool:
    return node.op_type == "Gather" and index == 0 and attribute(node, "axis", 0) == axis
