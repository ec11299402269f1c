"""Heads that Attention splits itself: the same numbers as numpy's, from fewer nodes; nothing else is touched."""

import numpy as np
import pytest

ort = pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")

from onnx_ir.passes.common import ShapeInferencePass  # noqa: E402

from layershare.export.attention import join_heads  # noqa: E402
from layershare.export.graph import tidy  # noqa: E402

TEXTS, TOKENS, HEADS, SIZE = 2, 5, 4, 3
GRAPH = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[texts, tokens, 12] q, float[texts, tokens, KV] k, float[texts, tokens, KV] v,
   float[texts, 1, tokens, tokens] mask, bool[texts, 1, tokens, 1] blind) => (float[texts, tokens, 12] y)
<int64[4] apart = {0, 0, 4, 3}, int64[4] apart_kv = {0, 0, -1, 3}, int64[3] flat = {0, 0, 12}, float zero = {0.0}>
{
  q4 = Reshape(q, apart)
  k4 = Reshape(k, apart_kv)
  v4 = Reshape(v, apart_kv)
  qt = Transpose<perm=[0, 2, 1, 3]>(q4)
  kt = Transpose<perm=[0, 2, 1, 3]>(k4)
  vt = Transpose<perm=[0, 2, 1, 3]>(v4)
  a = Attention(qt, kt, vt, mask)
  w = Where(blind, zero, a)
  t = Transpose<perm=[0, 2, 1, 3]>(w)
  y = Reshape(t, flat)
}
"""


def made(kv=12, **changes):
    text = GRAPH.replace("KV", str(kv)).replace("-1, 3}", f"{kv // 3}, 3}}")
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    model = ir.from_onnx_text(text)
    ShapeInferencePass()(model)
    return model


def inputs(kv=12):
    draw = np.random.default_rng(0)
    q, k, v = (draw.standard_normal((TEXTS, TOKENS, n)).astype(np.float32) for n in (12, kv, kv))
    mask = np.where(draw.random((TEXTS, 1, TOKENS, TOKENS)) < 0.3, -np.inf, 0).astype(np.float32)
    mask[1, :, 2] = -np.inf  # a token that sees nothing
    return {"q": q, "k": k, "v": v, "mask": mask, "blind": np.isinf(mask).all(-1, keepdims=True)}


def reference(q, k, v, mask, blind):
    """Attention written down; a group of heads reads one head of keys and values."""
    apart = [x.reshape(TEXTS, TOKENS, -1, SIZE).swapaxes(1, 2) for x in (q, k, v)]
    q, k, v = (np.repeat(x, HEADS // x.shape[1], axis=1) for x in apart)
    odds = np.exp(q @ k.swapaxes(2, 3) / np.sqrt(SIZE) + mask)
    total = odds.sum(-1, keepdims=True)
    seen = np.where(blind, 0, odds @ v / np.where(total == 0, 1, total))
    return seen.swapaxes(1, 2).reshape(TEXTS, TOKENS, HEADS * SIZE)


def run(model, **arrays):
    return ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString()).run(None, arrays)[0]


def kinds(model):
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("kv", [12, 6, 3], ids=["all heads", "grouped", "one"])
def test_the_same_numbers_without_turning_anything(kv):
    model, given = made(kv), inputs(kv)
    join_heads(model)
    tidy(model)
    assert kinds(model) == ["Attention", "Squeeze", "Where"]
    assert np.allclose(run(model, **given), reference(**given), atol=1e-5)


def test_where_every_token_sees_something_only_attention_is_left():
    model, given = made(**{"  w = Where(blind, zero, a)\n": "", "(w)": "(a)"}), inputs()
    given["mask"][given["blind"][..., 0]] = 0
    given["blind"][:] = False
    join_heads(model)
    tidy(model)
    assert kinds(model) == ["Attention"]
    assert np.allclose(run(model, **given), reference(**given), atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"bool[texts, 1, tokens, 1] blind": "bool[texts, 4, tokens, 1] blind"},
        {"  t = Transpose": "  other = Relu(w)\n  t = Transpose"},
        {"k4 = Reshape(k, apart_kv)": "k4 = Transpose<perm=[0, 1, 2, 3]>(k4_)"}
        | {"q4 = ": "k4_ = Reshape(k, apart_kv)\n  q4 = "},
        {"{0, 0, 4, 3}, int64[4] apart_kv = {0, 0, 4, 3}": "{5, 2, 4, 3}, int64[4] apart_kv = {5, 2, 4, 3}"},
    ],
    ids=["each head by itself", "read twice", "not from a product", "rows of other texts"],
)
def test_what_is_made_otherwise_stays(changes):
    model = made(**changes)
    join_heads(model)
    tidy(model)
    assert kinds(model).count("Transpose") >= 4
    assert "Squeeze" not in kinds(model)


CACHED = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[texts, tokens, 8] q, float[texts, tokens, 4] k, float[texts, tokens, 4] v, float[texts, tokens, 2] cos,
   float[texts, tokens, 2] sin, float[texts, 1, past, 4] past_key, float[texts, 1, past, 4] past_value,
   float[texts, 1, tokens, all] mask)
   => (float[texts, tokens, 8] y, float[texts, 1, all, 4] present_key, float[texts, 1, all, 4] present_value)
<int64[4] apart = {0, 0, 2, 4}, int64[4] apart_kv = {0, 0, 1, 4}, int64[3] flat = {0, 0, 8}>
{
  q4 = Reshape(q, apart)
  k4 = Reshape(k, apart_kv)
  v4 = Reshape(v, apart_kv)
  qt = Transpose<perm=[0, 2, 1, 3]>(q4)
  kt = Transpose<perm=[0, 2, 1, 3]>(k4)
  vt = Transpose<perm=[0, 2, 1, 3]>(v4)
  qr = RotaryEmbedding<interleaved=0>(qt, cos, sin)
  kr = RotaryEmbedding<interleaved=0>(kt, cos, sin)
  present_key = Concat<axis=-2>(past_key, kr)
  present_value = Concat<axis=-2>(past_value, vt)
  a = Attention(qr, present_key, present_value, mask)
  t = Transpose<perm=[0, 2, 1, 3]>(a)
  y = Reshape(t, flat)
}
"""


def cached(**changes):
    text = CACHED
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new)
    model = ir.from_onnx_text(text)
    ShapeInferencePass()(model)
    return model


def behind(past):
    draw = np.random.default_rng(1)
    shapes = {"q": (2, 3, 8), "k": (2, 3, 4), "v": (2, 3, 4), "cos": (2, 3, 2), "sin": (2, 3, 2)}
    shapes |= {"past_key": (2, 1, past, 4), "past_value": (2, 1, past, 4), "mask": (2, 1, 3, past + 3)}
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def rotated(x, cos, sin):
    x = x.reshape(2, 3, -1, 4).swapaxes(1, 2)
    left, right, cos, sin = x[..., :2], x[..., 2:], cos[:, None], sin[:, None]
    return np.concatenate([left * cos - right * sin, left * sin + right * cos], -1)


@pytest.mark.parametrize("past", [0, 5])
def test_rotated_heads_behind_kept_ones_are_those_of_numpy_and_come_out_under_their_names(past):
    model, given = cached(), behind(past)
    join_heads(model)
    tidy(model)
    assert kinds(model) == ["RotaryEmbedding", "RotaryEmbedding", "Attention"]
    assert [one.name for one in model.graph.outputs] == ["y", "present_key", "present_value"]
    q, key = (rotated(given[name], given["cos"], given["sin"]) for name in "qk")
    key = np.concatenate([given["past_key"], key], 2)
    value = np.concatenate([given["past_value"], given["v"][:, None]], 2)
    odds = np.exp(q @ key.swapaxes(2, 3) / 2 + given["mask"])
    y = (odds / odds.sum(-1, keepdims=True) @ value).swapaxes(1, 2).reshape(2, 3, 8)
    session = ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    for found, wanted in zip(session.run(None, given), (y, key, value), strict=True):
        assert np.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        (
            "present_value = Concat<axis=-2>(past_value, vt)",
            "present_value = Identity(vt)",
        ),  # one of them alone
        (
            "a = Attention(qr, present_key",
            "s = Shape(present_key)\n  a = Attention(qr, present_key",
        ),  # read before
        ("kr = RotaryEmbedding<interleaved=0>(kt, cos, sin)", "kr = Neg(kt)"),  # anything in between
        (
            "a = Attention(",
            "q0 = Neg(qr)\n  z = Attention(q0, present_key, present_value)\n  a = Attention(",
        ),  # not first
    ],
)
def test_what_is_kept_otherwise_stays_as_it_is(change):
    model = cached(change=change)
    before = kinds(model)
    join_heads(model)
    assert kinds(model) == before
