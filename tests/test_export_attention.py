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
