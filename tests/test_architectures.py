"""Any architecture: stacks by structure, small models by the kinds of their fields, and the laws on a fast subset.

``benchmarks/architectures.py`` puts every model type to the same laws.
"""

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from layershare import cli, find_stacks, make_plan, plan_of, share
from layershare.architectures import table, write
from layershare.architectures.inputs import run
from layershare.architectures.laws import Report, check_laws
from layershare.architectures.shrink import SIZES, shrink
from layershare.architectures.small import small_model
from layershare.errors import ModelError, PlanError
from layershare.sharing.layout import resolve

TYPES = [
    "bert",
    "roberta",
    "deberta-v2",
    "mpnet",
    "modernbert",
    "gpt2",
    "llama",
    "qwen3",
    "gemma3_text",
    "mixtral",
    "mamba2",
    "jamba",
    "t5",
    "bart",
    "marian",
    "vit",
    "swin",
    "dinov2",
    "yolos",
    "clip",
    "siglip",
    "wav2vec2",
    "whisper",
    "speecht5",
    "llava",
    "falcon_mamba",  # computes otherwise if its config says that it is quantized
    "kimi_k25",  # is stored with fused and permuted maps
]
PRESETS: dict[str, dict[str, int]] = {"cycle_rev": {"unique": 2}, "basis": {"rank": 2}}


@pytest.mark.parametrize("model_type", TYPES)
def test_the_laws_hold(model_type):
    small = small_model(model_type)
    report = check_laws(small.model, small.inputs, small.auto_class, PRESETS)
    assert not report.failed
    assert not report.skipped
    assert len(report.kept) == len(PRESETS) * (8 if small.model.can_generate() else 6)
    assert small.size < 5_000_000
    assert min(stack.length for stack in find_stacks(small.model)) >= (2 if model_type == "swin" else 4)


def test_albert_is_reported_as_already_shared():
    small = small_model("albert")
    with pytest.raises(
        ModelError, match=r"already shared, .*albert_layer_groups stores one layer and applies it 4 times"
    ):
        find_stacks(small.model)
    assert table(["albert"]).rows[0].reason.startswith("it is already shared")


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("t5", ["encoder.block", "decoder.block"]),
        ("clip", ["text_model.encoder.layers", "vision_model.encoder.layers"]),
        ("swin", [f"encoder.layers.{stage}.blocks" for stage in range(4)]),
    ],
)
def test_a_plan_names_every_stack(model_type, names):
    model = small_model(model_type).model
    assert [stack.name for stack in find_stacks(model)] == names
    plan = make_plan(model, "all")
    assert [one.name for one in plan.stacks] == names
    assert all(name in plan.picture() for name in names)


def test_a_preset_on_one_stack_leaves_the_others_alone():
    small = small_model("t5")
    student = share(small.model, make_plan(small.model, "all", stack="encoder.block"))
    encoder, decoder = find_stacks(student)
    assert encoder.tied
    assert not decoder.tied
    before, after = dict(small.model.named_parameters()), dict(student.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("decoder.block"))


def test_different_presets_on_different_stacks_go_in_one_plan():
    model = small_model("clip").model
    text = make_plan(model, "all", stack="text_model.encoder.layers")
    both = text.model_copy(
        update={
            "stacks": text.stacks
            + make_plan(model, "cycle", unique=2, stack="vision_model.encoder.layers").stacks
        }
    )
    student: Any = share(model, both)
    assert plan_of(student) == both
    text_layers, vision_layers = student.text_model.encoder.layers, student.vision_model.encoder.layers
    assert text_layers[0].mlp.fc1.weight is text_layers[3].mlp.fc1.weight
    assert vision_layers[0].mlp.fc1.weight is vision_layers[2].mlp.fc1.weight
    assert vision_layers[0].mlp.fc1.weight is not vision_layers[1].mlp.fc1.weight


def test_unlike_layers_are_shared_with_their_likes_only():
    """Attention every second layer, experts every second one: each kind gets the preset for itself."""
    model = small_model("jamba").model
    stack = find_stacks(model)[0]
    assert len(stack.kinds) > 1
    plan = make_plan(model, "adjacent", unique=2)
    kinds = {position: number for number, positions in enumerate(stack.kinds) for position in positions}
    assert plan.stacks[0].groups
    assert all(len({kinds[position] for position in group.positions}) == 1 for group in plan.stacks[0].groups)
    assert not resolve((stack,), plan).notes


def test_a_part_that_only_some_layers_have_is_named_in_the_notes():
    """T5's first layer brings the table of relative positions."""
    model = small_model("t5").model
    notes = resolve(find_stacks(model), make_plan(model, "all")).notes
    assert any("relative_attention_bias" in note and "[0]" in note for note in notes)


def test_the_plan_printer_says_what_is_unlike(tmp_path, capsys):
    """A relative-position table in the first layer; attention every second layer, experts every second one."""
    for model_type, words in {
        "t5": [
            "note: encoder.block: layer.0.SelfAttention.relative_attention_bias.weight [32, 4]",
            "[0] only",
        ],
        "jamba": ["note: model.layers has layers of 2 kinds, which share only with their likes: 0, 2; 1, 3"],
        "bert": [],
    }.items():
        small_model(model_type).model.save_pretrained(tmp_path / model_type)
        assert cli.main(["plan", str(tmp_path / model_type), "--preset", "all"]) == 0
        text = capsys.readouterr().out
        assert all(one in text for one in words), text
        assert bool(words) == ("note: " in text)


def test_alternating_layers_keep_the_order_of_a_preset():
    class Wide(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, width), nn.Linear(width, 8)

    model = nn.Module()
    model.layers = nn.ModuleList(Wide(16 if position % 2 else 32) for position in range(8))
    groups = make_plan(model, "sequence", unique=4).stacks[0].groups
    assert [group.positions for group in groups] == [(0, 2), (1, 3), (4, 6), (5, 7)]
    with pytest.raises(PlanError, match="takes unique = 1 to 8"):
        make_plan(model, "sequence", unique=9)


class TestShrink:
    @pytest.mark.parametrize(
        "name",
        ["LlamaConfig", "T5Config", "WhisperConfig", "DeepseekV3Config", "Qwen3VLConfig", "SwinConfig"],
    )
    def test_is_small_and_of_the_same_class(self, name):
        config = shrink(getattr(transformers, name)())
        assert type(config) is getattr(transformers, name)
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(config)
        assert sum(parameter.numel() for parameter in model.parameters()) < 3_000_000

    def test_shrinks_a_config_that_somebody_set(self):
        given = transformers.LlamaConfig(
            num_hidden_layers=80, hidden_size=8192, num_attention_heads=64, num_key_value_heads=8
        )
        config = shrink(given)
        assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (4, 64, 4)
        assert (config.num_key_value_heads, config.head_dim, config.vocab_size) == (2, 16, 128)
        assert given.num_hidden_layers == 80

    def test_special_tokens_stay_different_and_inside_the_vocabulary(self):
        config = shrink(transformers.BartConfig())
        special = [config.bos_token_id, config.eos_token_id, config.pad_token_id]
        assert len(set(special)) == 3
        assert max(special) < config.vocab_size

    def test_lists_with_an_entry_per_layer_are_cut(self):
        config = shrink(transformers.LlamaConfig().__class__())
        assert config.num_hidden_layers == 4
        hybrid = shrink(transformers.Gemma3TextConfig())
        assert len(hybrid.layer_types) == 4

    def test_heads_times_head_size_stays_the_same_multiple_of_the_width(self):
        config = shrink(transformers.Mamba2Config())
        assert config.num_heads * config.head_dim == config.expand * config.hidden_size

    def test_no_size_names_a_model(self):
        assert all(dataclasses.asdict(size) for size in SIZES)


def test_inputs_are_the_same_every_time():
    small = small_model("clip")
    assert set(small.inputs) >= {"input_ids", "pixel_values"}
    ones, others = run(small.model, small.inputs), run(small.model, small_model("clip").inputs)
    assert all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def test_an_unknown_failure_is_a_finding_and_not_a_crash():
    report = Report()
    report.check("a law", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    report.check("another", lambda: "wrong", lambda: "wrong as well")
    assert report.failed == {"a law": "ZeroDivisionError: division by zero"}
    assert report.skipped == {"another": "the stock model: wrong as well"}


def test_a_law_that_is_broken_is_seen(monkeypatch):
    from layershare.architectures import laws

    small = small_model("bert")
    monkeypatch.setattr(laws, "unshare", lambda _: small.model)
    report = check_laws(small.model, small.inputs, small.auto_class, {"all": {}})
    assert list(report.failed) == ["all: unshared"]


class TestTable:
    def test_tells_stacks_lengths_and_reasons(self, tmp_path):
        made = table(["bert", "swin", "albert", "layoutlmv2"])
        assert made.found == 2
        write(tmp_path / "page.md", made)
        page = (tmp_path / "page.md").read_text()
        assert "| bert | `encoder.layer` 12 x BertLayer |" in page
        assert "`encoder.layers.*.blocks` 2+2+6+2 x SwinLayer" in page
        assert "detectron2" in page
        assert "**Stacks in 2 of 4 model types**" in page
        assert made.to_dict()["rows"][0]["stacks"][0]["lengths"] == (12,)

    def test_merges_the_outcome_of_the_laws(self, tmp_path):
        file = tmp_path / "laws.jsonl"
        file.write_text('{"type": "bert", "outcome": "pass", "kept": 32, "skipped": {}}\n')
        made = table(["bert"], laws=file)
        assert made.passed == 1
        assert "pass (32 kept, 0 n/a)" in made.markdown()

    def test_does_not_load_weights_or_the_network(self):
        code = "from layershare.architectures import table; print(table(['mixtral']).rows[0].stacks[0])"
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
        )
        assert "32 x MixtralDecoderLayer" in run.stdout
