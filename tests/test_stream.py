"""Sharing from file to file: the same bytes as in memory, and never half of them."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save, save_file

import layershare
from laws import PRESETS, plan_for, same
from layershare import SharingPlan, cli, find_stacks, share, verify
from layershare.errors import LayershareError, ModelError, OptionError, PlanError, StoreError
from layershare.sharing.folder import share_folder
from layershare.store import shards
from layershare.store.disk import PAGE, ROOM
from layershare.store.open import load_model, outline
from layershare.store.shards import Shards
from layershare.store.stream import share_stream


def weighted(model: Any, name: str) -> SharingPlan:
    """A plan of the core's tests that needs no activations."""
    text = plan_for(model, name).model_dump_json()
    return SharingPlan.from_dict(json.loads(text.replace("regmean", "mean")))


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All files but the record of the run, which names the command."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "result.json"}


def both(source: Path, plan: SharingPlan, where: Path, size: str = "4KB") -> tuple[dict, dict]:
    """All files of the two ways."""
    share(load_model(source), plan).save_pretrained(where / "memory", max_shard_size=size)
    (where / "stream").mkdir(parents=True)
    share_stream(outline(source), plan, source, where / "stream", max_shard_size=size)
    return bytes_of(where / "memory"), bytes_of(where / "stream")


@pytest.mark.parametrize("name", [*PRESETS, "mixed"])
def test_the_files_are_those_of_the_way_through_memory(tiny, tmp_path, kind, name):
    model = tiny(kind).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    plan = weighted(model, name)
    memory, stream = both(tmp_path / "source", plan, tmp_path)
    assert any("-of-" in file for file in stream)
    assert memory == stream


@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_precisions_and_ties(tiny, tmp_path, dtype, embeddings):
    model = tiny("llama", tie_word_embeddings=embeddings).to(dtype)
    model.save_pretrained(tmp_path / "source")
    memory, stream = both(tmp_path / "source", weighted(model, "mixed"), tmp_path, "5GB")
    assert {"model.safetensors", "generation_config.json"} < stream.keys()
    assert memory == stream


def test_a_large_matrix_is_averaged_in_blocks(tiny, tmp_path):
    model = tiny("llama", hidden_size=128, intermediate_size=300)
    model.save_pretrained(tmp_path / "source")
    plan = layershare.make_plan(model, "sandwich")
    share_folder(tmp_path / "source", tmp_path / "out", plan=saved(plan, tmp_path), stream=True)
    shared = load_file(tmp_path / "out" / "model.safetensors")
    members = next(group.positions for group in plan.stacks[0].groups)
    name = "model.layers.{}.mlp.up_proj.weight"
    mean = sum(model.get_parameter(name.format(i)).double() for i in members) / len(members)
    torch.testing.assert_close(shared[name.format(members[0])], mean.float())


def saved(plan: SharingPlan, where: Path) -> Path:
    plan.save(where / "plan.toml")
    return where / "plan.toml"


def test_the_verb(tiny, tokenizer, tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    tiny("gpt2").save_pretrained(source)
    tokenizer.save_pretrained(source)
    words = ["share", str(source), "--preset", "cycle", "--unique", "2", "--rank", "2", "--json"]
    assert cli.main([*words, "-o", str(out), "--stream"]) == 0
    said = capsys.readouterr().out
    assert cli.main([*words, "-o", str(tmp_path / "memory")]) == 0
    assert said.replace(str(out), "OUT") == capsys.readouterr().out.replace(str(tmp_path / "memory"), "OUT")
    assert bytes_of(out) == bytes_of(tmp_path / "memory")
    assert {"tokenizer.json", "plan.toml"} < bytes_of(out).keys()
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    verify(again)
    assert same(again, share(load_model(source), SharingPlan.load(out / "plan.toml")))


def test_no_weight_is_held(tiny, tmp_path, monkeypatch):
    """What is alive when a tensor is written: a group and what was made of it, however many layers there are."""
    tiny("llama", num_hidden_layers=12).save_pretrained(tmp_path / "source")
    put, alive = Shards.put, []

    def held() -> int:
        tensors = (
            one
            for one in gc.get_objects()
            if type(one) in (torch.Tensor, torch.nn.Parameter) and not one.is_meta
        )
        return sum(one.nbytes for one in tensors)

    def counting(self: Shards, name: str, tensor: torch.Tensor) -> None:
        put(self, name, tensor)
        if len(self.expected) % 8 == 0:
            alive.append(held())

    before = held()
    opened = outline(tmp_path / "source")
    plan = layershare.make_plan(opened, unique=6)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Shards, "put", counting)
    share_stream(opened, plan, tmp_path / "source", tmp_path / "out")
    assert len(alive) > 5
    assert max(alive) - before <= 4 * max(tensor.nbytes for tensor in opened.state_dict().values())


def test_names_of_another_head_and_of_older_checkpoints(tiny, tmp_path):
    """transformers takes the prefix of a base model on or off, and renames: so does this."""
    bert = tiny("bert")
    bert.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    renamed = {
        f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for name, t in tensors.items()
    }
    assert not renamed.keys() & tensors.keys()
    save_file(renamed | {"cls.bias": torch.zeros(3)}, file, {"format": "pt"})
    memory, stream = both(tmp_path / "source", weighted(bert, "mixed"), tmp_path)
    assert memory == stream


def test_a_checkpoint_of_mixed_precision_becomes_what_loading_makes_of_it(tiny, tmp_path):
    model = tiny("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    torch.manual_seed(5)
    odd = {name: torch.randn(t.shape) for name, t in tensors.items() if "norm" in name or "q_proj" in name}
    save_file(tensors | odd, file, {"format": "pt"})
    memory, stream = both(tmp_path / "source", weighted(model, "mixed"), tmp_path)
    assert memory == stream


@pytest.mark.parametrize("equal", [True, False])
def test_tied_embeddings_that_are_stored_twice(tiny, tmp_path, equal):
    model = tiny("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if equal else 1)
    save_file(tensors, file, {"format": "pt"})
    plan = weighted(model, "adjacent")
    if equal:
        memory, stream = both(tmp_path / "source", plan, tmp_path)
        assert memory == stream
    else:
        with pytest.raises(ModelError, match=r"its own lm_head.weight.*without --stream"):
            both(tmp_path / "source", plan, tmp_path)


def test_tied_embeddings_that_are_stored_by_the_other_name(tiny, tmp_path):
    model = tiny("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, {"format": "pt"})
    memory, stream = both(tmp_path / "source", weighted(model, "adjacent"), tmp_path)
    assert memory == stream


# --- what is refused


def test_experts_that_are_joined_when_loaded_are_refused(tmp_path):
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=2, vocab_size=24,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "source")
    assert any(".experts.1." in name for name in load_file(tmp_path / "source" / "model.safetensors"))
    with pytest.raises(ModelError, match=r"source: .*joined or cut.*Share it without --stream"):
        share_folder(tmp_path / "source", tmp_path / "out", unique=2, stream=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def broken_source(model: Any, folder: Path, how: str) -> None:
    model.save_pretrained(folder, max_shard_size="8KB")
    first = sorted(folder.glob("*.safetensors"))[0]
    if how == "a tensor is gone":
        tensors = load_file(first)
        tensors.pop(next(name for name in tensors if "layers" in name))
        save_file(tensors, first, {"format": "pt"})
    elif how == "a shard is gone":
        first.unlink()
    elif how == "a shard is cut off":
        first.write_bytes(first.read_bytes()[:-10])
    elif how == "it is shared":
        share(model, layershare.make_plan(model, "all")).save_pretrained(folder, max_shard_size="8KB")


REFUSED: dict[str, tuple[type[LayershareError], str, dict[str, Any]]] = {
    "a tensor is gone": (ModelError, r"source lacks model.layers", {}),
    "a shard is gone": (ModelError, "source", {}),
    "a shard is cut off": (ModelError, "source", {}),
    "it is shared": (PlanError, "shared already", {}),
    "a calibration": (OptionError, "--stream", {"calibration": [Path("x.txt")], "task": "causal-lm"}),
    "regression mean": (PlanError, "regmean.*needs activations", {"merge": "regmean"}),
    "no such preset": (PlanError, "adjacent", {"preset": "adjacnt"}),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_is_refused_leaves_nothing(tiny, tmp_path, how):
    error, words, options = REFUSED[how]
    broken_source(tiny("llama"), tmp_path / "source", how)
    with pytest.raises(error, match=words):
        share_folder(tmp_path / "source", tmp_path / "out", **{"unique": 2, "stream": True} | options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_disk_that_is_too_small(tiny, tmp_path, monkeypatch):
    tiny("llama").save_pretrained(tmp_path / "source")
    usage = shards.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match=re.escape(str(tmp_path)) + " has 0.0 GB free"):
        share_folder(tmp_path / "source", tmp_path / "out", unique=2, stream=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# --- the files themselves


def test_files_are_those_of_the_safetensors_library(tmp_path):
    torch.manual_seed(0)
    kinds = list(shards.KINDS)
    tensors = {f"é{i % 5}.{i}": torch.randn(3, i + 1).to(kind) for i, kind in enumerate(kinds + kinds[::-1])}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3)}
    announced = {name: tensor.to("meta") for name, tensor in tensors.items()}
    with Shards(tmp_path, announced, 1) as out:
        for name in reversed(tensors):
            out.put(name, tensors[name])
    save_file(tensors, tmp_path / "reference", {"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "reference").read_bytes()


def test_a_tensor_that_never_comes_is_an_error(tmp_path):
    announced = {name: torch.empty(2, device="meta") for name in "abc"}
    with pytest.raises(StoreError, match="b and 1 more"), Shards(tmp_path, announced, 6) as out:
        out.put("a", torch.ones(2))


def test_large_pieces_at_any_place_in_the_file(tmp_path, monkeypatch):
    """Whole pages go past the page cache and the ends through it: no byte is lost between them, whatever the order."""
    torch.manual_seed(0)
    sizes = (2 * ROOM + 12_345, 4096, 1, ROOM, 5000, 0, 8191)
    tensors = {f"t{i}": torch.randint(0, 255, (size,), dtype=torch.uint8) for i, size in enumerate(sizes)}
    writes: list[tuple[int, int]] = []
    write = os.pwrite
    with Shards(tmp_path, {name: tensor.to("meta") for name, tensor in tensors.items()}, 1) as out:
        monkeypatch.setattr(
            "layershare.store.disk.os.pwrite",
            lambda number, data, start: (writes.append((number, len(data))), write(number, data, start))[1],
        )
        direct = out.places["t0"][0].direct
        for name in ("t3", "t0", "t6", "t1", "t2", "t5", "t4"):
            out.put(name, tensors[name])
    assert (tmp_path / "model.safetensors").read_bytes() == save(tensors, {"format": "pt"})
    if direct >= 0:  # this disk can
        assert sum(size for number, size in writes if number != direct) < 2 * PAGE * len(tensors)


@pytest.mark.parametrize("refuses", ["opening", "writing", "all but a part"])
def test_a_disk_without_direct_writing(tmp_path, monkeypatch, refuses):
    opened, written = os.open, os.pwrite
    direct: set[int] = set()

    def opening(path: Any, flags: int, *rest: Any) -> int:
        if not flags & os.O_DIRECT:
            return opened(path, flags, *rest)
        if refuses == "opening":
            raise OSError(22, "Invalid argument")
        direct.add(number := opened(path, flags, *rest))
        return number

    def writing(number: int, data: Any, start: int) -> int:
        if number not in direct:
            return written(number, data, start)
        if refuses == "writing":
            raise OSError(22, "Invalid argument")
        return written(number, data[:4096], start)

    monkeypatch.setattr("layershare.store.disk.os.open", opening)
    monkeypatch.setattr("layershare.store.disk.os.pwrite", writing)
    tensor = torch.arange(5000)
    with Shards(tmp_path, {"a": tensor.to("meta")}, 1) as out:
        out.put("a", tensor)
    assert (tmp_path / "model.safetensors").read_bytes() == save({"a": tensor}, {"format": "pt"})


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
from layershare.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def command(code: str, words: list[str], **how: Any) -> subprocess.Popen[str]:
    python = os.pathsep.join([str(Path(layershare.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": python}
    return subprocess.Popen([sys.executable, "-c", code, *words], env=env, text=True, **how)


@pytest.mark.parametrize(("most", "named"), [(16384, r"model.safetensors"), (100, "out")])
def test_a_file_that_cannot_grow_is_one_line_and_leaves_nothing(tiny, tmp_path, most, named):
    tiny("llama").save_pretrained(tmp_path / "source")
    words = ["share", str(tmp_path / "source"), "--unique", "2", "--stream", "-o", str(tmp_path / "out")]
    child = command(FULL, [str(most), *words], stderr=subprocess.PIPE)
    _, said = child.communicate()
    assert child.returncode == 2
    line = (
        rf"layershare: error: \S+{named}: cannot be written \(File too large\)\.( Choose another disk\.)?\n"
    )
    assert re.fullmatch(line, said)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("writes", range(1, 22, 4))
def test_a_disk_that_is_full_at_any_time(tiny, tmp_path, monkeypatch, writes):
    """Another process took the room meanwhile: whichever write fails, directly or not, nothing is left."""
    tiny("llama").save_pretrained(tmp_path / "source")
    written, left = os.pwrite, iter(range(writes))

    def full(number: int, data: Any, start: int) -> int:
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        return written(number, data, start)

    monkeypatch.setattr("layershare.store.disk.os.pwrite", full)
    with pytest.raises(StoreError, match=r"model.safetensors: cannot be written \(No space left on device\)"):
        share_folder(tmp_path / "source", tmp_path / "out", unique=2, stream=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


SLOW = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from layershare.store.shards import Shards
put = Shards.put
def slow(*args):
    put(*args)
    os.write(1, b"put\\n")
    time.sleep(0.2)
Shards.put = slow
from layershare.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_output_and_the_next_one_is_whole(tiny, tmp_path, sent):
    source, out = tmp_path / "source", tmp_path / "out"
    model = tiny("llama")
    model.save_pretrained(source)
    words = ["share", str(source), "--unique", "2", "--stream", "-o", str(out)]
    child = command(SLOW, words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout is not None
    assert child.stdout.readline() == "put\n"
    time.sleep(0.1)
    child.send_signal(sent)
    assert child.wait() != 0
    assert not out.exists()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"source"} | ({"out.part"} if sent == signal.SIGKILL else set())
    assert cli.main(words) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
    reference = share(load_model(source), layershare.make_plan(find_stacks(model), unique=2))
    assert same(transformers.AutoModelForCausalLM.from_pretrained(out), reference)
