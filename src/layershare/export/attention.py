"""Attention as ONNX Runtime's operators take it, and as they are fast.  Works on ``onnx_ir`` models, in place."""

from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from layershare.export.graph import attribute, before, constant

HEADS_APART = [0, 2, 1, 3]


def spread_angles(model: ir.Model) -> None:
    """Give each text of a batch its row of angles: models may number positions once for all, ONNX Runtime's
    RotaryEmbedding wants as many rows as texts. Angles that are used in many layers are spread once."""
    spread: dict[ir.Value, ir.Value] = {}
    for node in [node for node in model.graph if node.op_type == "RotaryEmbedding" and len(node.inputs) == 3]:
        for place, angles in list(enumerate(node.inputs))[1:]:
            assert angles is not None
            if angles not in spread:
                texts = ir.node("Shape", node.inputs[:1], {"start": 0, "end": 1})
                ones = ir.node("Constant", [], {"value": ir.tensor(np.array([1, 1], np.int64))})
                shape = ir.node("Concat", [texts.outputs[0], ones.outputs[0]], {"axis": 0})
                rows = ir.node("Expand", [angles, shape.outputs[0]])
                for made in (texts, ones, shape, rows):
                    made.outputs[0].name = f"{angles.name}.{made.op_type}"
                model.graph.insert_before(node, [texts, ones, shape, rows])
                spread[angles] = rows.outputs[0]
            node.replace_input_with(place, spread[angles])


class _Source(NamedTuple):
    """Where queries, keys or values come from."""

    flat: ir.Value
    """[texts, tokens, heads * size], as it comes from the product."""
    heads: int
    turned: ir.Node | None
    """What rotates them, once the heads are apart."""
    past: ir.Node | None
    """What puts them behind those that were kept."""


def join_heads(model: ir.Model) -> None:
    """Let ``Attention`` split its heads, and put keys and values behind those that were kept, where all that reaches it
    and leaves it is only turned for its sake.

    An exporter writes a Reshape and a Transpose around it, four times a layer; the operator takes
    [texts, tokens, heads * size] as it comes from the product, if it is told the number of heads, and so does the
    rotation of queries and keys. What nothing reads any more is left for ``tidy``.
    """
    graph = model.graph
    for node in [node for node in graph if node.op_type == "Attention" and len(node.outputs) == 1]:
        queries, keys, values = (_source(node, value) for value in node.inputs[:3])
        ends = _joined(node)
        if ends is None or queries is None or keys is None or values is None or len(node.inputs) > 4:
            continue
        if queries.past is not None or (keys.past is None) != (values.past is None):
            continue
        made, last = _attention(node, queries, keys, values).outputs[0], ends[-1].outputs[0]
        made.shape, made.type = last.shape, last.type
        if ends[0].op_type == "Where":  # zeros for tokens that see nothing: one answer for all heads
            blind = before(ends[0], "Squeeze", [ends[0].inputs[0], _first_axis(graph)])
            made = before(ends[0], "Where", [blind, ends[0].inputs[1], made])
            made.shape, made.type = last.shape, last.type
        _take_over(last, made)


def _attention(node: ir.Node, queries: _Source, keys: _Source, values: _Source) -> ir.Node:
    """The same attention on what is not split, put before ``node``; with the past it also gives keys and values."""
    inputs = [_turned(node, one) for one in (queries, keys, values)]
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    kept = [] if keys.past is None or values.past is None else [keys.past, values.past]
    made = ir.node(
        "Attention",
        [*inputs, mask, *(one.inputs[0] for one in kept)],
        {name: attr.value for name, attr in node.attributes.items()}
        | {"q_num_heads": queries.heads, "kv_num_heads": keys.heads},
        num_outputs=1 + len(kept),
    )
    node.graph.insert_before(node, made)  # type: ignore[union-attr]
    for old, new in zip((one.outputs[0] for one in kept), made.outputs[1:], strict=True):
        _take_over(old, new)
    return made


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Read ``new`` wherever ``old`` was read, also from outside, by its name."""
    new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = f"{old.name}.apart", old.name


def _turned(node: ir.Node, source: _Source) -> ir.Value:
    if source.turned is None:
        return source.flat
    given = {name: attr.value for name, attr in source.turned.attributes.items()}
    made = before(
        node,
        "RotaryEmbedding",
        [source.flat, *source.turned.inputs[1:]],
        **given | {"num_heads": source.heads},
    )
    made.shape, made.type = source.flat.shape, source.flat.type
    return made


def _source(node: ir.Node, value: ir.Value | None) -> _Source | None:
    past = turned = None
    if value is not None and _behind_the_past(value, node):
        past = value.producer()
        value = past.inputs[1]  # type: ignore[union-attr]
    maker = None if value is None else value.producer()
    if maker is not None and maker.op_type == "RotaryEmbedding":
        turned, value = maker, maker.inputs[0]
    found = _split(value)
    return None if found is None else _Source(*found, turned, past)


def _behind_the_past(value: ir.Value, attention: ir.Node) -> bool:
    """Whether it is a graph's input with new tokens behind it, and read by attentions alone, by this one first: then it
    may as well come out of this one."""
    node = value.producer()
    if node is None or node.op_type != "Concat" or attribute(node, "axis", 0) not in (-2, 2):
        return False
    start, *more = node.inputs
    if start is None or not start.is_graph_input() or len(more) != 1 or attention.graph is None:
        return False
    readers = {reader for reader, _ in value.uses()}
    return (
        all(reader.op_type == "Attention" for reader in readers)
        and next(one for one in attention.graph if one in readers) is attention
    )


def _split(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """What was made [texts, heads, tokens, size], before that, and how many heads; None if it was made otherwise."""
    turn = None if value is None else value.producer()
    if turn is None or turn.op_type != "Transpose" or list(attribute(turn, "perm", ())) != HEADS_APART:
        return None
    apart = turn.inputs[0]
    view = None if apart is None else apart.producer()
    if apart is None or view is None or view.op_type != "Reshape":
        return None
    flat = view.inputs[0]
    if flat is None or not _same_rows(flat, apart):
        return None
    heads: int = apart.shape[2]  # type: ignore[index, assignment]
    return flat, heads


def _same_rows(flat: ir.Value, apart: ir.Value | None) -> bool:
    """Whether [texts, tokens, heads * size] and [texts, tokens, heads, size] are the same numbers in the same order."""
    if apart is None or flat.shape is None or apart.shape is None:
        return False
    if (flat.shape.rank(), apart.shape.rank()) != (3, 4) or flat.shape[0] != apart.shape[0]:
        return False
    heads, each = apart.shape[2:]
    return isinstance(heads, int) and isinstance(each, int) and flat.shape[2] == heads * each


def _joined(attention: ir.Node) -> list[ir.Node] | None:
    """The nodes that follow, up to the one that gives [texts, tokens, heads * size]; None if there are others."""
    kinds, ends, node = ["Where", "Transpose", "Reshape"], [], attention
    while kinds:
        uses = list(node.outputs[0].uses())
        if len(uses) != 1 or node.outputs[0].is_graph_output():
            return None
        node = uses[0][0]
        if kinds[0] == "Where" and node.op_type == "Transpose":
            kinds.pop(0)
        if node.op_type != kinds.pop(0):
            return None
        ends.append(node)
    turn, view = ends[-2:]
    if list(attribute(turn, "perm", ())) != HEADS_APART or not _same_rows(view.outputs[0], turn.outputs[0]):
        return None
    return ends if ends[0].op_type != "Where" or _for_all_heads(ends[0]) else None


def _for_all_heads(choice: ir.Node) -> bool:
    """Whether a Where takes one number, the same for all heads, in place of what a token gathered."""
    blind, other = choice.inputs[:2]
    if blind is None or other is None or blind.shape is None or other.shape is None:
        return False
    return blind.shape.rank() == 4 and blind.shape[1] == 1 and other.shape.rank() == 0


def _first_axis(graph: ir.Graph) -> ir.Value:
    name = "heads.axis"
    return graph.initializers.get(name) or constant(graph, name, np.array([1], np.int64))
