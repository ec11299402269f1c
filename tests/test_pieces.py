"""Batches in pieces: the same texts, and the same moments and changes as whole batches give."""

import pytest
import torch

from layershare.sharing import pieces as room
from layershare.sharing.pieces import pieces
from layershare.sharing.sensitivity import sensitivities
from layershare.tasks import answers, get_task


def batch(texts: int = 5, tokens: int = 7) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 20, (texts, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_a_language_model_gets_as_many_texts_as_fit(tiny, monkeypatch):
    model, whole = tiny("llama"), batch()
    assert list(pieces(model, whole)) == [whole]
    monkeypatch.setattr(room, "LOGITS", 2 * 7 * model.config.vocab_size)
    cut = list(pieces(model, whole))
    assert [len(piece["input_ids"]) for piece in cut] == [2, 2, 1]
    for name, value in whole.items():
        assert torch.equal(torch.cat([piece[name] for piece in cut]), value)


def test_a_model_without_a_vocabulary_and_inputs_not_by_text_stay_whole(tiny, monkeypatch):
    monkeypatch.setattr(room, "LOGITS", 1)
    assert len(list(pieces(tiny("bert"), batch()))) == 1
    odd = batch() | {"position_ids": torch.arange(7)[None]}
    assert list(pieces(tiny("llama"), odd)) == [odd]


def test_sensitivities_in_pieces_are_those_of_the_texts_one_by_one(tiny, monkeypatch):
    model, whole, name = tiny("llama"), batch(texts=3), "model.layers.1.mlp.up_proj"
    alone = [{key: value[i : i + 1] for key, value in whole.items()} for i in range(3)]
    wanted = sensitivities(model, [name], alone, seed=2)[name]
    monkeypatch.setattr(room, "LOGITS", 1)
    assert torch.allclose(sensitivities(model, [name], [whole], seed=2)[name], wanted)


@pytest.mark.parametrize("limit", [1 << 26, 1])
def test_the_change_of_logits_is_their_divergence(tiny, monkeypatch, limit):
    monkeypatch.setattr(room, "LOGITS", limit)
    model, other, whole = tiny("llama"), tiny("llama", seed=1), batch()
    change = answers.output_change(get_task("causal-lm"), model, [whole])
    with torch.no_grad():
        p, q = (one(**whole).logits.softmax(-1) for one in (model, other))
    assert change(model) == pytest.approx(0, abs=1e-6)
    assert change(other) == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)


def test_of_many_logits_evenly_spread_tokens_are_compared(tiny, monkeypatch):
    model, other, whole = tiny("llama"), tiny("llama", seed=1), batch()
    monkeypatch.setattr(answers, "KEPT", 35 * model.config.vocab_size // 5)
    monkeypatch.setattr(answers, "SPARED", 5)
    change = answers.output_change(get_task("causal-lm"), model, [whole])
    with torch.no_grad():
        p, q = (one(**whole).logits.softmax(-1).flatten(0, 1)[::5] for one in (model, other))
    assert change(other) == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)


def test_texts_that_would_give_few_answers_are_not_run(tiny, monkeypatch):
    """Room for the logits of two texts, of which every second token is compared: every second text is run."""
    model, other, whole = tiny("llama"), tiny("llama", seed=1), batch(texts=9)
    alone = [{key: value[i : i + 1] for key, value in whole.items()} for i in range(9)]
    monkeypatch.setattr(answers, "KEPT", 2 * 7 * model.config.vocab_size)
    monkeypatch.setattr(answers, "SPARED", 2)
    change = answers.output_change(get_task("causal-lm"), model, alone)
    runs = []
    other.register_forward_pre_hook(lambda *_: runs.append(1))
    found = change(other)
    assert len(runs) == 5
    with torch.no_grad():
        p, q = (one(**whole).logits.softmax(-1)[::2, ::2] for one in (model, other))
    assert found == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)


def test_an_embedding_in_bfloat16_has_not_moved_from_itself(tiny, batch_for):
    model = tiny("bert").to(torch.bfloat16)
    batch = batch_for("bert")
    batch |= {"attention_mask": torch.ones_like(batch["input_ids"])}
    change = answers.output_change(get_task("sentence-embedding"), model, [batch])
    assert abs(change(model)) < 1e-6
