"""What is measured on a padded batch is what is measured on its rows alone: of sounds, whose frames are not their
samples, and of targets, which end where no attention mask says it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    HubertConfig,
    HubertForCTC,
    OPTConfig,
    OPTForCausalLM,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
)
from transformers import WhisperForConditionalGeneration as Whisper

from layershare.prune.importance import matching_loss, of_inputs, of_positions
from layershare.sharing.padding import frames_of, padding_of, told_apart
from layershare.sharing.pairs import collect_pairs, readers_of_sums
from layershare.sharing.statistics import collect

SIZE: dict[str, Any] = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=[8, 8],
    conv_kernel=[40, 4], conv_stride=[20, 4], num_feat_extract_layers=2, feat_extract_norm="layer",
    do_stable_layer_norm=True, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0.0,
    layerdrop=0.0, vocab_size=9,
)  # fmt: skip
FAMILIES = ["wav2vec2", "hubert", "t5", "opt"]
Batch = dict[str, torch.Tensor]


@pytest.fixture(params=FAMILIES)
def case(request, tiny) -> tuple[Any, Batch, list[Batch], list[str], list[str]]:
    """(model, a padded batch, its rows alone, linear maps, layers)."""
    torch.manual_seed(0)
    if request.param == "t5":
        sources, targets = (
            [torch.randint(5, 20, (1, n)) for n in (9, 5)],
            [torch.randint(5, 20, (1, n)) for n in (3, 7)],
        )
        alone = [
            {"input_ids": s, "attention_mask": torch.ones_like(s), "labels": t}
            for s, t in zip(sources, targets, strict=True)
        ]
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        maps = ["encoder.block.1.layer.1.DenseReluDense.wi", "decoder.block.1.layer.0.SelfAttention.q"]
        layers = ["encoder.block.1", "decoder.block.1"]
        return tiny("t5"), _padded(alone, fill), alone, maps, layers
    if request.param == "opt":
        return in_one_row()
    model: Any = {
        "wav2vec2": lambda: Wav2Vec2ForCTC(Wav2Vec2Config(**SIZE)),
        "hubert": lambda: HubertForCTC(HubertConfig(**SIZE)),
    }[request.param]()
    waves = [torch.randn(1, n) for n in (4000, 1700)]
    alone = [{"input_values": w, "attention_mask": torch.ones_like(w).long()} for w in waves]
    base = request.param
    maps = [
        f"{base}.encoder.layers.1.feed_forward.intermediate_dense",
        f"{base}.encoder.layers.0.attention.k_proj",
    ]
    layers = [f"{base}.encoder.layers.{i}" for i in (0, 1)]
    return model.eval(), _padded(alone, {"input_values": 0.0, "attention_mask": 0}), alone, maps, layers


def in_one_row() -> tuple[OPTForCausalLM, Batch, list[Batch], list[str], list[str]]:
    """A case of a model that puts the tokens of all texts in one row before its feed-forward maps."""
    sizes = dict(
        hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = OPTForCausalLM(OPTConfig(**sizes, vocab_size=24, max_position_embeddings=32)).eval()
    texts = [torch.randint(5, 20, (1, n)) for n in (9, 5)]
    alone = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in texts]
    layers = ["model.decoder.layers.0", "model.decoder.layers.1"]
    maps = [f"{layers[0]}.self_attn.q_proj", f"{layers[1]}.fc1", f"{layers[1]}.fc2"]
    return model, _padded(alone, {"input_ids": 1, "attention_mask": 0}), alone, maps, layers


def _padded(rows: list[Batch], fill: dict[str, float]) -> Batch:
    made = {}
    for name, value in fill.items():
        width = max(row[name].shape[1] for row in rows)
        made[name] = torch.cat([
            torch.nn.functional.pad(row[name], (0, width - row[name].shape[1]), value=value) for row in rows
        ])  # fmt: skip
    return made


def test_second_moments(case):
    model, padded, alone, maps, _ = case
    together, apart = collect(model, maps, [padded]), collect(model, maps, alone)
    for name in maps:
        torch.testing.assert_close(together[name], apart[name], rtol=1e-4, atol=1e-5)


def test_sums_are_found_where_all_tokens_stand_in_one_row():
    (model, padded, alone, *_), (other, *_) = in_one_row(), in_one_row()
    out, fc2 = (f"model.decoder.layers.0.{leaf}" for leaf in ("self_attn.out_proj", "fc2"))
    readers = readers_of_sums(model, [out, fc2], padded)
    assert readers == {out: "model.decoder.layers.0.final_layer_norm", fc2: "model.decoder.layers.1"}
    sums = {name: (reader, reader) for name, reader in readers.items()}
    together, apart = (
        collect_pairs(model, other, {out: out, fc2: fc2}, rows, sums) for rows in ([padded], alone)
    )
    for name in sums:
        for one, two in zip(together[name], apart[name], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_importances(case):
    model, padded, alone, maps, layers = case
    for by in ("activation", "wanda"):
        together, apart = (of_inputs(model, maps, by, rows, lambda *_: None) for rows in ([padded], alone))
        for name in maps:
            torch.testing.assert_close(together[name], apart[name], rtol=1e-4, atol=1e-5)
    together, apart = (
        of_positions(model, layers, "influence", rows, lambda *_: None) for rows in ([padded], alone)
    )
    assert together == pytest.approx(apart, rel=2e-3)  # of tiny numbers


def test_outputs_matched_to_a_teacher(case):
    model, padded, alone, _, _ = case
    torch.manual_seed(1)
    teacher = type(model)(model.config).eval()
    loss = matching_loss(teacher)
    with torch.no_grad():
        sizes = [model(**row).logits.shape[1] for row in alone]
        apart = sum(float(loss(model, row)) * n for row, n in zip(alone, sizes, strict=True)) / sum(sizes)
        assert float(loss(model, padded)) == pytest.approx(apart, rel=1e-4)


def test_frames_are_those_that_the_model_itself_attends_to(case):
    model, padded, *_ = case
    if not hasattr(model, "_get_feature_vector_attention_mask"):
        assert frames_of(model, padded["attention_mask"]) is None
        return
    found = frames_of(model, padded["attention_mask"])
    assert found is not None
    theirs = model._get_feature_vector_attention_mask(found.shape[1], padded["attention_mask"])
    assert torch.equal(found, theirs.bool())
    assert padding_of(model, padded)((2, 7)) is None


def test_a_whisper_looks_where_the_sound_is():
    """Its attention mask is one of the spectrogram, two frames of which are one position."""
    config = WhisperConfig(
        vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=50, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model, mask = Whisper(config).eval(), torch.ones(1, 100, dtype=torch.long)
    mask[:, 60:] = 0
    batch = {
        "input_features": torch.randn(1, 80, 100),
        "attention_mask": mask,
        "labels": torch.tensor([[5, 6, 2]]),
    }
    seen: list[torch.Tensor] = []
    name = "model.encoder.layers.1.fc1"
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = collect(model, [name], [batch])[name]
    hook.remove()
    heard = seen[0][0, :30]
    torch.testing.assert_close(found, heard.T @ heard / 30, rtol=1e-4, atol=1e-5)


def test_the_padding_of_a_source_is_not_taken_for_that_of_a_target_of_its_shape():
    source, target = torch.tensor([[1, 1, 1], [1, 0, 0]]), torch.tensor([[5, 6, -100], [7, 8, 9]])
    batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 0, 0]]), "attention_mask": source, "labels": target}
    apart = told_apart(batch)
    assert apart["input_ids"].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    model = nn.Linear(1, 1)
    model.config = SimpleNamespace(is_encoder_decoder=True)
    mask = padding_of(model, apart)
    assert torch.equal(mask((2, 3)), target != -100)
    assert torch.equal(mask((2, 4))[:, :3], source.bool())
    assert told_apart(batch | {"labels": target[:, :2]})["input_ids"].shape == (2, 3)
