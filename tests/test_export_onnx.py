"""ONNX export: every weight once, outputs those of PyTorch, int8 that really is; judged by numpy and onnxruntime."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ort = pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxscript")

import torch  # noqa: E402

from layershare import find_stacks, make_plan, share  # noqa: E402
from layershare.errors import ModelError, OptionError, StoreError  # noqa: E402
from layershare.export import export, graph  # noqa: E402
from layershare.export.int8 import quantize, to_bytes  # noqa: E402
from layershare.export.onnx import _manifest  # noqa: E402
from layershare.onnx import Runner, load  # noqa: E402
from layershare.onnx import runner as runner_of  # noqa: E402
from layershare.plan import Group, SharingPlan, StackPlan  # noqa: E402
from layershare.tasks import pooling as pooling_of  # noqa: E402

DRAW = np.random.default_rng(0)
NARROW = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
SIZES = {
    "bert": NARROW,
    "vit": NARROW | dict(num_hidden_layers=2),
    "llama": NARROW | dict(num_key_value_heads=1, num_hidden_layers=2),
    "t5": dict(d_model=32, d_kv=16, num_layers=3, num_decoder_layers=3),
}


@pytest.fixture
def folder(tiny, tokenizer, tmp_path):
    """``folder("llama", preset="all")``: a saved tiny model, shared by that plan, with a tokenizer."""

    def make(kind, model=None, **plan):
        made = model or tiny(kind, **SIZES[kind])
        made = share(made, make_plan(made, **plan)) if plan else made
        made.save_pretrained(tmp_path / kind)
        if kind != "vit":
            tokenizer.save_pretrained(tmp_path / kind)
        return made, tmp_path / kind

    return make


def test_a_shared_encoder_is_stored_once_and_encodes_as_pytorch_does(folder, tokenizer, tmp_path):
    model, source = folder("bert", preset="all")
    made = export(source, tmp_path / "out", "onnx")
    once = sum(p.nbytes for p in {id(p): p for p in model.encoder.parameters()}.values())
    written = ir.load(tmp_path / "out" / "model.onnx").graph.initializers.values()
    layers = sum(v.const_value.nbytes for v in written if ".layer." in v.name)
    assert layers <= once
    assert not [n for n in ir.load(tmp_path / "out" / "model.onnx").graph if n.op_type == "Transpose"]
    assert made.bytes_stored <= 1.02 * made.bytes_unique
    assert (made.products, made.shared, made.quantized) == (18, 18, 0)
    texts = ["the cat sits on the mat", "a dog", "the man runs in the park"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    assert np.allclose(load(tmp_path / "out").encode(texts), mean.numpy(), atol=1e-5)


@pytest.mark.parametrize("int8", [False, True])
def test_pivoted_factors_are_exported_as_they_are_stored(tiny, tokenizer, tmp_path, int8):
    model = tiny("bert", **SIZES["bert"])
    stack = find_stacks(model)[0]
    groups = (Group(positions=(p,), method="basis", rank=12, pivots=True) for p in range(stack.length))
    plan = StackPlan(name=stack.name, length=stack.length, groups=tuple(groups))
    student = share(model, SharingPlan(stacks=(plan,)))
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    made = export(tmp_path / "student", tmp_path / "out", "onnx", int8=int8)
    assert made.products == 21  # two a map, without those of fewer numbers than is worth counting
    assert made.quantized == 21 * int8
    assert made.difference < (0.05 if int8 else 1e-5)
    assert made.bytes_stored <= 1.05 * made.bytes_unique


def test_poolings_are_those_of_torch_and_an_empty_text_is_a_number():
    states = DRAW.standard_normal((3, 4, 5)).astype(np.float32)
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]], np.float32)
    for name, pooling in runner_of.POOLINGS.items():
        wanted = pooling_of.POOLINGS[name](torch.from_numpy(states), torch.from_numpy(mask)).numpy()
        assert np.allclose(pooling(states, mask), wanted, atol=1e-6), name
    assert set(pooling_of.POOLINGS.values()) == {pooling_of.POOLINGS[name] for name in runner_of.POOLINGS}
    assert (runner_of.POOLINGS["mean"](states, 0 * mask) == 0).all()


@pytest.mark.parametrize(
    ("said", "module", "wanted"),
    [
        ({"pooling_mode": ["mean"]}, "Normalize", "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "Normalize", "cls"),
        ({"pooling_mode": "lasttoken"}, "Normalize", "lasttoken"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "Normalize", None),
        ({"pooling_mode": "mean"}, "Dense", None),
    ],
)
def test_the_manifest_says_the_models_own_pooling(said, module, wanted, tiny, tmp_path):
    model = tiny("bert")
    model.config._name_or_path = str(tmp_path)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2", module)]
    (tmp_path / "modules.json").write_text(json.dumps([{"path": p, "type": f"x.{t}"} for p, t in modules]))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(said))
    assert _manifest(model, None)["pooling"] == wanted


def opened(folder, **said):
    """A runner of a manifest without graphs."""
    plain = {name: [] for name in ("eos", "start", "barred", "barred_first", "beyond_greedy")}
    plain |= dict(kind="encoder", max_length=None, int8=False, pooling="mean", graphs={})
    folder.mkdir(exist_ok=True)
    (folder / runner_of.MANIFEST).write_text(json.dumps(plain | said))
    (folder / "config.json").write_text("{}")
    return load(folder)


def test_a_pooling_that_is_not_computed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Runner, "_require", lambda *_: None)
    with pytest.raises(OptionError, match="does not compute"):
        opened(tmp_path, pooling=None).encode(["x"])


def test_the_start_token_and_what_greedy_search_does_not_follow(tiny, tmp_path):
    model = tiny("t5")
    model.config.decoder_start_token_id, model.generation_config.decoder_start_token_id = 3, 0
    assert _manifest(model, None)["start"] == [0]
    model.generation_config.decoder_start_token_id = None
    model.generation_config.forced_bos_token_id = 0
    said = _manifest(model, None)
    assert (said["start"], said["beyond_greedy"]) == ([3], ["forced_bos_token_id"])
    with pytest.raises(OptionError, match="forced_bos_token_id"):
        opened(tmp_path, **said).generate(["x"])
    model.config.decoder_start_token_id = None
    with pytest.raises(ModelError, match="decoder_start_token_id"):
        _manifest(model, None)


def test_running_a_graph_leaves_nothing_in_the_users_home(tmp_path):
    """Neither an id of the machine nor a report that waits to be sent (telemetry of onnxruntime)."""
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape([1]))
    y = ir.node("Identity", [x])
    y.outputs[0].name, y.outputs[0].dtype = "y", ir.DataType.FLOAT
    ir.save(
        ir.Model(ir.Graph([x], y.outputs, nodes=[y], opset_imports={"": 20}), ir_version=10),
        tmp_path / "m.onnx",
    )
    home = tmp_path / "home"
    home.mkdir()
    code = "import sys; from layershare.onnx.session import open_session; open_session(sys.argv[1])"
    env = {n: v for n, v in os.environ.items() if n != "ORT_DISABLE_TELEMETRY" and not n.startswith("XDG_")}
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "m.onnx"], env=env | {"HOME": str(home)}, check=True
    )
    assert not list(home.iterdir())


@pytest.mark.parametrize("name", [runner_of.MANIFEST, "config.json"])
def test_a_broken_file_is_named(name, tmp_path):
    opened(tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(StoreError, match=name):
        load(tmp_path)


def test_a_classifier_in_int8_has_every_product_quantised_and_names_its_labels(tokenizer, folder, tmp_path):
    import transformers

    names = {0: "good", 1: "bad", 2: "odd"}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=64, max_position_embeddings=64, id2label=names, **NARROW)
    original = transformers.BertForSequenceClassification(config).eval()
    model, source = folder("bert", original, preset="gated", unique=2)
    made = export(source, tmp_path / "out", "onnx", int8=True)
    assert made.quantized == made.products == 19  # six a layer, and the pooler
    nodes = [node.op_type for node in ir.load(tmp_path / "out" / "model.onnx").graph]
    assert nodes.count("MatMulIntegerToFloat") == 19
    assert made.bytes_stored < 0.5 * made.bytes_unique  # of a tiny model much is norms
    texts = ["the cat sits", "a dog runs in the park"]
    with torch.no_grad():
        wanted = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    runner = load(tmp_path / "out")
    assert np.abs(runner.logits(texts) - wanted.numpy()).max() < 0.05 * wanted.abs().max()
    assert [label for label, _ in runner.classify(texts)] == [
        names[int(i)] for i in runner.logits(texts).argmax(1)
    ]
    with pytest.raises(OptionError, match="no embeddings"):
        runner.encode(texts)


def test_atoms_are_stored_once_and_each_position_mixes_them(folder, tokenizer, tmp_path):
    model, source = folder("bert", preset="atoms", unique=2)
    made = export(source, tmp_path / "onnx", "onnx")
    assert made.bytes_stored <= 1.02 * made.bytes_unique
    assert (made.products, made.shared) == (18, 18)
    small = export(source, tmp_path / "int8", "onnx", int8=True)
    assert small.quantized == small.products == 18
    batch = tokenizer(["the cat sits on the mat", "a dog"], padding=True, return_tensors="pt")
    with torch.no_grad():
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    texts = ["the cat sits on the mat", "a dog"]
    assert np.allclose(load(tmp_path / "onnx").encode(texts), mean.numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_greedy_tokens_are_those_of_generate(kind, folder, tmp_path):
    model, source = folder(kind, preset="all")
    model.generation_config.eos_token_id = None  # or short rows would be padded
    made = export(source, tmp_path / "out", "onnx")
    assert made.difference < 1e-4 * made.scale
    assert made.agreement == 1
    assert made.bytes_stored <= 1.02 * made.bytes_unique + 2048  # constants of a tiny graph
    ids = torch.randint(5, 20, (2, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, : 2 if kind != "t5" else 0] = 0
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=7, do_sample=False, pad_token_id=0)
    runner = load(tmp_path / "out")
    runner.eos = []
    found = runner.generate_ids({"input_ids": ids.numpy(), "attention_mask": mask.numpy()}, max_new_tokens=7)
    assert found.tolist() == wanted[:, -7:].tolist()


def test_an_image_model(folder, tmp_path, batch_for):
    model, source = folder("vit", preset="all")
    made = export(source, tmp_path / "out", "onnx")
    assert made.kind == "vision"
    pixels = batch_for("vit")["pixel_values"]
    with torch.no_grad():
        wanted = model(pixels).last_hidden_state.numpy()
    assert np.allclose(
        load(tmp_path / "out")(pixel_values=pixels.numpy())["last_hidden_state"], wanted, atol=1e-5
    )


@pytest.mark.parametrize(
    ("twice", "reason"),
    [(True, "bytes of weights where the model has"), (False, "differ from those of")],
)
def test_an_export_that_stores_twice_or_computes_something_else_is_not_kept(
    twice, reason, folder, tmp_path, monkeypatch
):
    from layershare.export import onnx as module

    _, source = folder("vit")
    made = module.trace

    def spoilt(program):
        model = made(program)
        weights = [value for value in graph.weights(model) if graph.size(value) >= graph.MATRIX]
        for value in weights if twice else ():
            graph.constant(model.graph, f"{value.name}.copy", value.const_value.numpy() + 1)
        weights[-1].const_value = ir.tensor(weights[-1].const_value.numpy() * 2, name=weights[-1].name)
        return model

    monkeypatch.setattr(module, "trace", spoilt)
    monkeypatch.setattr(graph, "tidy", lambda _: None)
    with pytest.raises(StoreError, match=reason):
        export(source, tmp_path / "out", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["vit"]


def test_int8_goes_with_onnx_only_and_foreign_folders_are_refused(tmp_path):
    with pytest.raises(OptionError, match="dense"):
        export(tmp_path, tmp_path / "out", "dense", int8=True)
    with pytest.raises(StoreError, match="not written by layershare export"):
        load(tmp_path)


def graph_of(nodes, inputs, outputs, weights):
    """A graph with float inputs and outputs of these shapes."""
    initializers = [ir.val(name, const_value=ir.tensor(array, name=name)) for name, array in weights.items()]
    values = {value.name: value for value in initializers}
    for name, (dtype, shape) in inputs.items():
        values[name] = ir.val(name, shape=ir.Shape(shape), dtype=dtype)
    made = []
    for op, names, out, attributes in nodes:
        node = ir.node(op, [values[name] for name in names], attributes=attributes)
        node.outputs[0].name = out
        values[out] = node.outputs[0]
        made.append(node)
    for name in outputs:
        values[name].dtype = ir.DataType.FLOAT
    return ir.Model(
        ir.Graph([values[name] for name in inputs], [values[name] for name in outputs], nodes=made,
                 initializers=initializers, opset_imports={"": 20}, name="g"),
        ir_version=10,
    )  # fmt: skip


def run(model, **arrays):
    return ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString()).run(None, arrays)


@pytest.fixture
def tied():
    """A table [50, 32] that is looked up and is the output layer, and a weight used by three products, transposed."""
    table, shared = (DRAW.standard_normal(shape).astype(np.float32) for shape in ((50, 32), (32, 32)))
    bias = DRAW.standard_normal(32).astype(np.float32)
    nodes = [("Gather", ["table", "ids"], "h0", {})]
    for i in range(3):
        nodes.append(("Transpose", ["w"], f"w{i}", {"perm": [1, 0]}))
        nodes.append(("MatMul", [f"h{i}", f"w{i}"], f"p{i}", {}))
        nodes.append(("Add", [f"p{i}", "b"], f"h{i + 1}", {}))
    nodes += [("Transpose", ["table"], "tt", {"perm": [1, 0]}), ("MatMul", ["h3", "tt"], "y", {})]
    ids = np.array([[3, 49, 0], [7, 7, 1]])
    h = table[ids]
    for _ in range(3):
        h = h @ shared.T + bias
    model = graph_of(
        nodes, {"ids": (ir.DataType.INT64, [2, 3])}, ["y"], {"table": table, "w": shared, "b": bias}
    )
    return model, ids, h @ table.T, table.nbytes + shared.nbytes


def test_tidy_stores_a_transposed_weight_and_a_tied_table_once(tied):
    model, ids, wanted, size = tied
    graph.tidy(model)
    assert graph.stored([model], graph.MATRIX) == size
    assert len({id(right) for _, right in graph.products(model)}) == 2
    assert np.allclose(run(model, ids=ids)[0], wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("ids_come_again", [False, True])
def test_quantize_keeps_sharing_and_comes_near(tied, ids_come_again, monkeypatch):
    model, ids, wanted, size = tied
    if ids_come_again:  # as those of freed values may
        monkeypatch.setattr("layershare.export.int8.id", lambda _: 0, raising=False)
    graph.tidy(model)
    quantize(model)
    found = list(graph.products(model))
    assert [node.op_type for node, _ in found] == ["MatMulIntegerToFloat"] * 4
    assert len({id(right) for _, right in found}) == 2
    assert graph.stored([model], graph.MATRIX) == size / 4
    assert not [n for n in model.graph if n.op_type == "MatMul"]
    assert np.abs(run(model, ids=ids)[0] - wanted).max() < 0.03 * np.abs(wanted).max()


def test_gemm_is_turned_and_quantised_with_its_bias():
    weight, bias = (DRAW.standard_normal(shape).astype(np.float32) for shape in ((32, 32), (32,)))
    nodes = [("Gemm", [name, "w", "b"], out, {"transB": 1}) for name, out in (("x", "h"), ("h", "y"))]
    model = graph_of(nodes, {"x": (ir.DataType.FLOAT, [3, 32])}, ["y"], {"w": weight, "b": bias})
    x = DRAW.standard_normal((3, 32)).astype(np.float32)
    wanted = (x @ weight.T + bias) @ weight.T + bias
    graph.tidy(model)
    assert np.allclose(run(model, x=x)[0], wanted, rtol=1e-4, atol=1e-3)
    assert graph.stored([model], graph.MATRIX) == weight.nbytes
    quantize(model)
    assert [node.op_type for node, _ in graph.products(model)] == ["MatMulIntegerToFloat"] * 2
    assert np.abs(run(model, x=x)[0] - wanted).max() < 0.03 * np.abs(wanted).max()


def test_bytes_are_within_half_a_step_of_each_column():
    array = DRAW.standard_normal((40, 6)).astype(np.float32) * np.array([1, 10, 0, 1e-3, 5, 2], np.float32)
    quantized, scale = to_bytes(array, axis=1)
    assert quantized.dtype == np.int8
    assert (np.abs(quantized * scale - array) <= scale / 2 + 1e-6).all()
    assert (np.abs(quantized).max(0) == np.array([127, 127, 0, 127, 127, 127])).all()


def test_several_graphs_keep_a_common_weight_in_one_file_once(tmp_path):
    weight = DRAW.standard_normal((32, 32)).astype(np.float32)
    models = {
        name: graph_of(
            [("MatMul", ["x", "w"], "y", {})], {"x": (ir.DataType.FLOAT, [2, 32])}, ["y"], {"w": weight}
        )
        for name in ("encoder", "decoder")
    }
    assert graph.shared(models.values()) == 2
    assert graph.shared([models["encoder"]]) == 0
    files = graph.save(models, tmp_path)
    assert (tmp_path / graph.DATA).stat().st_size == weight.nbytes
    x = DRAW.standard_normal((2, 32)).astype(np.float32)
    shutil.move(str(tmp_path), str(Path(f"{tmp_path}-moved")))
    for file in files.values():
        session = ort.InferenceSession(str(Path(f"{tmp_path}-moved") / file))
        assert np.allclose(session.run(None, {"x": x})[0], x @ weight, atol=1e-4)
