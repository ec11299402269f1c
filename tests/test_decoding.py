"""Speculative decoding: the tokens of greedy search, whatever the draft guesses; a draft is a view, not a copy."""

import pytest
import torch
import transformers

import layershare
from layershare import make_plan, share
from layershare.decoding import choose_draft, draft_view, speculative
from layershare.decoding.choose import promise
from layershare.errors import DataError, ModelError, OptionError

SIZES = dict(
    hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, num_key_value_heads=1,
    vocab_size=60, bos_token_id=2, eos_token_id=3, pad_token_id=0,
)  # fmt: skip
GPT2 = dict(n_embd=16, n_layer=4, n_head=2, n_positions=128, vocab_size=60, bos_token_id=2, eos_token_id=3)
SLIDING = SIZES | dict(
    head_dim=8,
    sliding_window=6,
    layer_types=["sliding_attention", "full_attention"] * 2,
    query_pre_attn_scalar=8,
)
MODELS = {
    "gpt2": ("GPT2", GPT2),
    "llama": ("Llama", SIZES),
    "gemma2": ("Gemma2", SLIDING),
    "gemma3": ("Gemma3Text", SLIDING),
    "mistral": ("Mistral", SIZES | dict(sliding_window=6)),
}


def decoder(name, shared=False):
    family, sizes = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**sizes))
    with torch.no_grad():  # as drawn, it would say one token for ever
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    if shared:
        model = share(model, make_plan(model, "cycle", unique=2))
    model.generation_config.eos_token_id = None
    return model.eval()


def greedy(model, ids, new=40, **more):
    return model.generate(
        ids, max_new_tokens=new, do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0, **more
    )


def text(seed=0, tokens=5):
    return torch.randint(5, 60, (1, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
@pytest.mark.parametrize("name", MODELS)
def test_the_tokens_are_those_of_greedy_search(name, shared):
    model = decoder(name, shared)
    accepted = set()
    for draft, tokens, sure in (((1, 3), 4, 0.0), ((0, 1, 2), 6, 0.5)):
        fast = speculative(model, draft, tokens=tokens, sure=sure)
        for ids in (text(0), text(1, 9)):
            expected = greedy(model, ids, 24)
            assert torch.equal(fast.generate(ids, max_new_tokens=24), expected)
            accepted.add(fast.accepted / fast.guessed)
            assert fast.rounds + fast.accepted == 24
        assert torch.equal(greedy(model, ids, 24, assistant_model=fast.assistant), expected)
    assert len(accepted) > 1  # right and wrong guesses were among them


def test_a_draft_of_all_positions_is_always_right():
    model = decoder("gpt2")
    fast = speculative(model, range(4), tokens=3, sure=0)
    fast.generate(text(), max_new_tokens=41)
    assert (fast.accepted, fast.guessed, fast.rounds) == (30, 30, 11)  # the prompt, then four tokens a round


def test_an_end_token_ends_it_in_the_middle_of_a_round():
    model = decoder("gpt2")
    said = greedy(model, text(), 20)[0].tolist()
    model.generation_config.eos_token_id = [said[12], 59]
    fast = speculative(model, (0, 1, 2), tokens=8, sure=0)
    assert torch.equal(fast.generate(text(), max_new_tokens=20), greedy(model, text(), 20))
    assert torch.equal(fast.generate(text(), max_new_tokens=1), greedy(model, text(), 1))


@pytest.mark.parametrize("name", MODELS)
def test_a_view_skips_positions_as_a_gate_of_zero_does_and_owns_nothing(name):
    from layershare.sharing.gate import add_gate

    model = decoder(name)
    with torch.no_grad():
        before = model(text()).logits
        view = draft_view(model, (0, 3))
        seen = view(text()).logits
        assert {id(p) for p in view.parameters()} == {id(p) for p in model.parameters()}
        assert torch.equal(model(text()).logits, before)
        layers = dict(model.named_modules())[next(s.name for s in layershare.find_stacks(model))]
        for position in (1, 2):
            add_gate(layers[position], 0.0)
        torch.testing.assert_close(seen, model(text()).logits)
        assert not torch.allclose(seen, before)


@pytest.mark.parametrize("name", MODELS)
def test_cached_steps_of_a_view_equal_its_uncached_ones(name):
    view, ids = draft_view(decoder(name), (1, 2)), text(2, 16)
    cache = transformers.DynamicCache(config=view.config)
    with torch.no_grad():
        expected = view(ids, use_cache=False).logits
        for start, end in ((0, 9), (9, 12), (12, 13), (13, 16)):
            step = view(ids[:, start:end], past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(step, expected[:, start:end], rtol=1e-4, atol=1e-4)


def test_the_draft_that_is_chosen_agrees_as_counted_and_a_useless_position_goes_first():
    model = decoder("llama")
    with torch.no_grad():  # position 2 adds next to nothing
        for parameter in (
            model.model.layers[2].self_attn.o_proj.weight,
            model.model.layers[2].mlp.down_proj.weight,
        ):
            parameter.mul_(1e-6)
    batches = [{"input_ids": torch.cat([text(i, 30), text(i + 50, 30)])} for i in range(3)]
    drafts = {len(draft.positions): draft for draft in choose_draft(model, batches)}
    assert sorted(drafts) == [1, 2, 3]
    assert drafts[3].positions == (0, 1, 3)
    assert drafts[3].agreement == 1.0
    with torch.no_grad():
        view = draft_view(model, drafts[2].positions)
        same = [
            (view(**b).logits.argmax(-1) == model(**b).logits.argmax(-1)).double().mean().item()
            for b in batches
        ]
    assert drafts[2].agreement == pytest.approx(sum(same) / 3)
    with pytest.raises(DataError, match="no text"):
        choose_draft(model, [])


def test_what_a_draft_promises():
    assert promise(1.0, 3, 0.5, 1.0) == pytest.approx(4 / 2.5)
    assert promise(0.0, 5, 0.5, 1.0) < 1
    assert promise(0.5, 2, 0.0, 1.0) == pytest.approx(1.75)


def test_what_cannot_be_done_is_said(tiny):
    model = decoder("gpt2")
    for arguments, match in (((model, (0, 4)), "no position 4"), ((model, ()), "at least one")):
        with pytest.raises(OptionError, match=match):
            speculative(*arguments)
    with pytest.raises(OptionError, match="one text"):
        speculative(model, (0,)).generate(torch.cat([text(), text()]))
    with pytest.raises(OptionError, match="tokens is 1"):
        speculative(model, (0,), tokens=0)
    model.generation_config.repetition_penalty = 1.2
    with pytest.raises(OptionError, match="repetition_penalty"):
        speculative(model, (0,)).generate(text())
    with pytest.raises(ModelError, match="no decoder"):
        speculative(tiny("t5"), (0,))
    mamba = transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=60, state_size=4)
    with pytest.raises(ModelError, match="cannot go back"):
        speculative(transformers.MambaForCausalLM(mamba), (0,))
