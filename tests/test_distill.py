"""Distillation: the teacher's targets, the terms of the loss, augmentation, and whole small runs."""

import json
from typing import Any

import pytest
import torch

from layershare.errors import DataError, ModelError, OptionError
from layershare.heal.distill import (
    Collator,
    DistillConfig,
    LossWeights,
    distill,
    kept_layers,
    loss_terms,
    matching_layers,
)
from layershare.heal.teacher import Target, cache_bytes, cached, live
from layershare.tasks import TASKS
from layershare.tasks.encoding import pad

EMBEDDING: Any = TASKS["sentence-embedding"]
CLASSIFICATION: Any = TASKS["text-classification"]
QUICK = DistillConfig(steps=15, batch_size=8, learning_rate=5e-3, max_length=16)


@pytest.fixture
def data(pairs_file):
    return EMBEDDING.read(pairs_file)


@pytest.fixture
def encoded(tokenizer, data):
    return EMBEDDING.encode(tokenizer, data.train, 16)


@pytest.fixture
def labelled(tmp_path):
    words = "cat dog man woman bird sits runs plays".split()  # noqa: SIM905
    rows = [
        {"text": f"{a} {b} {c}", "label": ["no", "yes"][(i + j + k) % 2]}
        for i, a in enumerate(words)
        for j, b in enumerate(words)
        for k, c in enumerate(words[:2])
    ]
    file = tmp_path / "labelled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CLASSIFICATION.read(file)


def classifier(layers=4, seed=0, names=("no", "yes"), **sizes):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    all_sizes: dict[str, Any] = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32) | sizes
    config = BertConfig(vocab_size=64, max_position_embeddings=64, num_hidden_layers=layers, **all_sizes)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    return BertForSequenceClassification(config).eval()


def some_batch(tokenizer, encoded, rows=(3, 0, 17, 5)):
    batch = Collator(tokenizer)([{**encoded[row], "row": row, "position": i} for i, row in enumerate(rows)])
    return {name: value for name, value in batch.items() if name != "row"}, batch["row"]


# ---- the teacher


@pytest.mark.parametrize("side", ["right", "left"])
def test_cached_targets_equal_live_ones(tiny, tokenizer, encoded, side, monkeypatch):
    monkeypatch.setattr(tokenizer, "padding_side", side)
    teacher = tiny("bert")
    inputs, rows = some_batch(tokenizer, encoded)
    ours = cached(teacher, EMBEDDING, tokenizer, encoded, (0, 3), batch_size=7)(inputs, rows)
    theirs = live(teacher, EMBEDDING, (0, 3))(inputs, rows)
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours.embedding, theirs.embedding, atol=1e-6, rtol=0)
    assert list(ours.hidden) == list(theirs.hidden) == [0, 3]
    for layer in (0, 3):
        torch.testing.assert_close(ours.hidden[layer][mask], theirs.hidden[layer][mask], atol=1e-6, rtol=0)
        assert not ours.hidden[layer][~mask].any()


def test_cached_logits_equal_live_ones(tokenizer, labelled):
    teacher = classifier()
    encoded = CLASSIFICATION.encode(tokenizer, labelled.train, 16)
    inputs, rows = some_batch(tokenizer, encoded)
    ours = cached(teacher, CLASSIFICATION, tokenizer, encoded)(inputs, rows)
    assert ours.embedding is None
    torch.testing.assert_close(
        ours.logits, live(teacher, CLASSIFICATION)(inputs, rows).logits, atol=1e-6, rtol=0
    )


def test_a_cache_of_some_rows_knows_only_those(tiny, tokenizer, encoded):
    teacher = tiny("bert")
    inputs, rows = some_batch(tokenizer, encoded)
    some = cached(teacher, EMBEDDING, tokenizer, encoded, (1,), rows=[17, 3, 5, 0, 3])
    torch.testing.assert_close(
        some(inputs, rows).embedding, live(teacher, EMBEDDING)(inputs, rows).embedding, atol=1e-6, rtol=0
    )
    with pytest.raises(IndexError, match=r"rows \[4\]"):
        some(*some_batch(tokenizer, encoded, (3, 4)))


def test_the_teacher_is_asked_without_dropout_and_without_gradients(tiny, tokenizer, encoded):
    teacher = tiny("bert").train()
    inputs, rows = some_batch(tokenizer, encoded)
    ask: Any = live(teacher, EMBEDDING)
    first, second = ask(inputs, rows), ask(inputs, rows)
    assert torch.equal(first.embedding, second.embedding)
    assert not first.embedding.requires_grad


def test_cache_bytes_counts_real_tokens(encoded):
    tokens = sum(map(sum, encoded["attention_mask"][:5]))
    assert cache_bytes(encoded, [0, 1, 2, 3, 4, 4], [0, 1], 16) == 4 * 16 * (5 + 2 * tokens)


# ---- the terms


def test_equal_models_cost_nothing(tiny, tokenizer, encoded):
    teacher = tiny("bert")
    inputs, rows = some_batch(tokenizer, encoded)
    pairs = [(i, i) for i in range(4)]
    target = live(teacher, EMBEDDING, range(4))(inputs, rows)
    outputs = EMBEDDING.forward(teacher, inputs, hidden_states=True)
    terms = loss_terms(outputs, target, LossWeights().model_dump(), pairs)
    assert set(terms) == {"embedding", "similarity", "hidden"}
    assert all(value.item() == 0 for value in terms.values())


def test_padding_does_not_change_the_loss(tiny, tokenizer, encoded):
    teacher, student = tiny("bert"), tiny("bert", seed=1)
    rows = [{**encoded[i], "row": i, "position": i} for i in range(4)]
    short = {name: value for name, value in Collator(tokenizer)(rows).items() if name != "row"}
    long = {name: torch.nn.functional.pad(value, (0, 7)) for name, value in short.items()}
    totals = []
    for inputs in (short, long):
        target = live(teacher, EMBEDDING, range(4))(inputs, torch.arange(4))
        outputs = EMBEDDING.forward(student, inputs, hidden_states=True)
        totals.append(loss_terms(outputs, target, LossWeights().model_dump(), [(i, i) for i in range(4)]))
    for name, value in totals[0].items():
        assert value.item() > 0
        assert totals[1][name].item() == pytest.approx(value.item(), rel=1e-5)


def test_weights_multiply_and_zero_leaves_out(tokenizer, labelled):
    teacher, student = classifier(), classifier(seed=1)
    encoded = CLASSIFICATION.encode(tokenizer, labelled.train, 16)
    inputs, rows = some_batch(tokenizer, encoded)
    target = live(teacher, CLASSIFICATION)(inputs, rows)
    outputs = CLASSIFICATION.forward(student, inputs)
    once, thrice = (loss_terms(outputs, target, {"logits": w}, temperature=2.0) for w in (1, 3))
    assert list(once) == ["logits"]
    assert thrice["logits"].item() == pytest.approx(3 * once["logits"].item())


def test_hidden_states_are_those_of_the_layer_map(tiny, tokenizer, encoded):
    model = tiny("bert")
    inputs, rows = some_batch(tokenizer, encoded)
    outputs = EMBEDDING.forward(model, inputs, hidden_states=True)
    target = live(model, EMBEDDING, (2,))(inputs, rows)
    assert loss_terms(outputs, target, {"hidden": 1}, [(2, 2)])["hidden"].item() == 0
    assert loss_terms(outputs, target, {"hidden": 1}, [(1, 2)])["hidden"].item() > 0
    # layer i writes hidden_states[i + 1]: the first entry is what the embeddings give
    assert torch.equal(target.hidden[2], outputs.hidden_states[3].detach())


# ---- layer maps


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (4, 4, [(0, 0), (1, 1), (2, 2), (3, 3)]),
        (3, 6, [(0, 1), (1, 3), (2, 5)]),
        (1, 6, [(0, 5)]),
        (2, 12, [(0, 5), (1, 11)]),
    ],
)
def test_matching_layers(ours, theirs, expected):
    assert matching_layers(ours, theirs) == expected


def test_kept_layers_write_what_the_next_one_read():
    assert kept_layers([0, 3, 5], 6) == [(0, 2), (1, 4), (2, 5)]
    assert kept_layers(range(4), 4) == matching_layers(4, 4)
    assert kept_layers([2], 6) == [(0, 5)]


# ---- augmentation


def test_without_augmentation_the_collator_only_pads(tokenizer, encoded):
    rows = [{**encoded[i], "row": i, "position": i} for i in range(3)]
    batch = Collator(tokenizer)(rows)
    assert batch["row"].tolist() == [0, 1, 2]
    assert torch.equal(batch["input_ids"], pad(tokenizer, rows)["input_ids"])


def test_augmentation_follows_seed_and_position_alone(tokenizer, encoded):
    def at(position, seed=0):
        torch.manual_seed(position * 7 + seed)
        return Collator(tokenizer, 0.5, seed)([{**encoded[0], "row": 0, "position": position}])[
            "input_ids"
        ].tolist()

    assert at(4) == at(4)
    assert len({str(at(position)) for position in range(20)}) > 10
    assert len({str(at(0, seed)) for seed in range(20)}) > 10


@pytest.mark.parametrize("chance", [0.3, 0.99])
def test_augmentation_leaves_out_ordinary_tokens_only(tokenizer, encoded, chance):
    collate = Collator(tokenizer, chance)
    row = encoded[0]["input_ids"]
    kept = 0
    for position in range(200):
        ids = collate([{**encoded[0], "row": 0, "position": position}])["input_ids"][0].tolist()
        assert (ids[0], ids[-1]) == (row[0], row[-1])  # [CLS] and [SEP]
        rest = iter(row)
        assert all(token in rest for token in ids)  # in their order
        assert len(ids) >= 3
        kept += len(ids) - 2
    if chance == 0.3:
        assert kept / 200 / (len(row) - 2) == pytest.approx(0.7, abs=0.05)


# ---- whole runs


def test_distillation_brings_the_student_nearer(tiny, tokenizer, data, tmp_path):
    teacher, student = tiny("bert"), tiny("bert", seed=1)
    before = EMBEDDING.evaluate(student, tokenizer, data.test, teacher=teacher)["agreement"]
    reference = {name: value.clone() for name, value in teacher.state_dict().items()}
    config = QUICK.model_copy(update={"steps": 40})
    history = distill(student, teacher, tokenizer, EMBEDDING, data, config, tmp_path, quiet=True)
    assert EMBEDDING.evaluate(student, tokenizer, data.test, teacher=teacher)["agreement"] > before + 0.1
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]
    assert {"embedding", "similarity", "hidden"} <= history[0].keys()
    assert all(torch.equal(value, reference[name]) for name, value in teacher.state_dict().items())


def test_a_perfect_student_stays_as_it_is(tiny, tokenizer, data, tmp_path):
    teacher, student = tiny("bert"), tiny("bert")
    config = QUICK.model_copy(update={"weight_decay": 0.0})
    history = distill(student, teacher, tokenizer, EMBEDDING, data, config, tmp_path, quiet=True)
    # Cached targets differ from live ones by rounding, and Adam makes a step of any gradient.
    assert history[0]["loss"] < 1e-9


def test_cached_and_live_teachers_train_alike(tiny, tokenizer, data, tmp_path):
    losses = []
    for name, megabytes in (("cached", 4096), ("live", 0)):
        config = QUICK.model_copy(update={"cache_mb": megabytes, "batch_size": 32})
        student = tiny("bert", seed=1)
        history = distill(
            student, tiny("bert"), tokenizer, EMBEDDING, data, config, tmp_path / name, quiet=True
        )
        losses.append([entry["loss"] for entry in history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_classification_is_learnt_from_logits(tokenizer, labelled, tmp_path):
    teacher, student = classifier(), classifier(layers=2, seed=1)
    with torch.no_grad():
        teacher.classifier.weight.mul_(50)  # so that it says both labels
    config = QUICK.model_copy(update={"steps": 60, "learning_rate": 1e-2})
    history = distill(student, teacher, tokenizer, CLASSIFICATION, labelled, config, tmp_path, quiet=True)
    assert {"logits", "hidden"} <= history[0].keys()
    assert history[-1]["logits"] < 0.5 * history[0]["logits"]


def test_a_student_with_fewer_layers(tiny, tokenizer, data, tmp_path):
    teacher, student = tiny("bert"), tiny("bert", num_hidden_layers=2)
    options: dict[str, Any] = {"layer_map": kept_layers([0, 2], 4), "quiet": True}
    assert distill(student, teacher, tokenizer, EMBEDDING, data, QUICK, tmp_path / "a", **options)
    assert distill(student, teacher, tokenizer, EMBEDDING, data, QUICK, tmp_path / "b", quiet=True)


@pytest.mark.parametrize("augment", [0.0, 0.3])
def test_an_interrupted_distillation_ends_with_the_same_bits(
    tiny, tokenizer, data, tmp_path, augment, monkeypatch
):
    config = QUICK.model_copy(update={"augment": augment, "save_every": 5, "dropout": True})
    whole, parts = tiny("bert", seed=1), tiny("bert", seed=1)
    distill(whole, tiny("bert"), tokenizer, EMBEDDING, data, config, tmp_path / "whole", quiet=True)

    class StoppedError(Exception):
        pass

    import layershare.heal.distill as module

    real = module.loss_terms
    calls: list[int] = []

    def failing(*args):
        calls.append(1)
        if len(calls) == 8:
            raise StoppedError
        return real(*args)

    folder = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(module, "loss_terms", failing)
        with pytest.raises(StoppedError):
            distill(
                tiny("bert", seed=1), tiny("bert"), tokenizer, EMBEDDING, data, config, folder, quiet=True
            )
    distill(parts, tiny("bert"), tokenizer, EMBEDDING, data, config, folder, quiet=True)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in parts.state_dict().items())


@pytest.mark.parametrize("train_embeddings", [False, True])
def test_embedding_tables_move_only_when_asked(tiny, tokenizer, data, tmp_path, train_embeddings):
    student = tiny("bert", seed=1)
    before = student.embeddings.word_embeddings.weight.detach().clone()
    config = QUICK.model_copy(update={"train_embeddings": train_embeddings})
    distill(student, tiny("bert"), tokenizer, EMBEDDING, data, config, tmp_path, quiet=True)
    assert torch.equal(student.embeddings.word_embeddings.weight, before) is not train_embeddings
    assert all(p.requires_grad for p in student.parameters())


def test_dropout_is_off_unless_asked_for(tiny, tokenizer, data, tmp_path):
    losses = []
    for name, dropout in (("off", False), ("on", True)):
        config = QUICK.model_copy(update={"steps": 2, "dropout": dropout, "train_embeddings": True})
        student = tiny("bert")
        history = distill(
            student, tiny("bert"), tokenizer, EMBEDDING, data, config, tmp_path / name, quiet=True
        )
        losses.append(history[0]["loss"])
    assert losses[0] < 1e-9 < 1e-3 < losses[1]


# ---- things that do not fit


def test_no_training_data(tiny, tokenizer, data, tmp_path):
    from dataclasses import replace

    with pytest.raises(DataError, match="no training data"):
        distill(tiny("bert"), tiny("bert"), tokenizer, EMBEDDING, replace(data, train=None), QUICK, tmp_path)


def test_hidden_sizes_must_agree_for_the_hidden_term(tiny, tokenizer, data, tmp_path):
    student = tiny("bert", hidden_size=8)
    with pytest.raises(ModelError, match=r"student 8, teacher 16.*weights\.hidden to 0"):
        distill(student, tiny("bert"), tokenizer, EMBEDDING, data, QUICK, tmp_path, quiet=True)


def test_a_layer_map_must_name_layers_that_are_there(tiny, tokenizer, data, tmp_path):
    with pytest.raises(OptionError, match="student layer 0 with teacher layer 4"):
        distill(tiny("bert"), tiny("bert"), tokenizer, EMBEDDING, data, QUICK, tmp_path, layer_map=[(0, 4)])


def test_a_teacher_with_other_labels(tokenizer, labelled, tmp_path):
    teacher, student = classifier(names=("good", "bad")), classifier()
    with pytest.raises(DataError, match="not one of the model's: good, bad"):
        distill(student, teacher, tokenizer, CLASSIFICATION, labelled, QUICK, tmp_path)


def test_no_loss_left(tiny, tokenizer, data, tmp_path):
    weights = LossWeights(embedding=0, similarity=0, hidden=0, logits=1)
    config = QUICK.model_copy(update={"weights": weights})
    with pytest.raises(OptionError, match="No loss is left for sentence-embedding"):
        distill(tiny("bert"), tiny("bert"), tokenizer, EMBEDDING, data, config, tmp_path)


def test_misspelt_settings_name_the_nearest():
    with pytest.raises(OptionError, match="Did you mean 'temperature'"):
        DistillConfig.parse({"temprature": 2})
    with pytest.raises(OptionError, match="Did you mean 'embedding'"):
        DistillConfig.parse({"weights": {"embeding": 1}})
    assert DistillConfig.parse({"weights": {"hidden": 0}}).weights.hidden == 0


def test_a_target_may_lack_what_a_task_does_not_have(tiny, tokenizer, encoded):
    inputs, _ = some_batch(tokenizer, encoded)
    outputs = EMBEDDING.forward(tiny("bert"), inputs)
    assert loss_terms(outputs, Target(None, None, {}), {"embedding": 1, "logits": 1}) == {}
