"""Distillation: the teacher's targets, the terms of the loss, augmentation, and whole small runs."""

import copy
import json
import math
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from layershare.errors import DataError, ModelError, OptionError, TrainingError
from layershare.heal.cache import TeacherOutputs
from layershare.heal.collator import Collator
from layershare.heal.config import DistillConfig, LossWeights
from layershare.heal.distill import distill, loss_terms
from layershare.heal.fit import check_processors
from layershare.heal.layers import kept_layers, matching_layers
from layershare.heal.questions import questions
from layershare.heal.relations import attention_maps, capture
from layershare.heal.teacher import Target, Wanted, live
from layershare.tasks import TASKS, get_task
from layershare.tasks.calibration import sample_batches
from layershare.tasks.encoding import pad

EMBEDDING: Any = TASKS["sentence-embedding"]
CLASSIFICATION: Any = TASKS["text-classification"]
ALL = Wanted(hidden=(0, 1, 2, 3))
QUICK = DistillConfig(steps=6, batch_size=8, learning_rate=5e-3, max_length=16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """40 pairs of short sentences, 32 of them to train on."""
    words = "cat dog man woman bird sits runs plays".split()  # noqa: SIM905
    rows = [
        f"{a} {b} on a mat{' in the park' * (a > b)},the {b} {a} {c},{len(a)}"
        for a in words
        for b in words[:5]
        for c in words[:1]
    ]
    file = tmp_path_factory.mktemp("pairs") / "pairs.csv"
    file.write_text("s1,s2,score\n" + "\n".join(rows) + "\n")
    return EMBEDDING.read(file)


@pytest.fixture
def encoded(tokenizer, data):
    return EMBEDDING.encode(tokenizer, data.train, 16)


@pytest.fixture(scope="module")
def labelled(labelled_file):
    return CLASSIFICATION.read(labelled_file)


@pytest.fixture(scope="module")
def labelled_file(tmp_path_factory):
    words = "cat dog man woman bird sits runs plays".split()  # noqa: SIM905
    rows = [
        {"text": f"{a} {b} {c}", "label": ["no", "yes"][i < 4]}
        for i, a in enumerate(words)
        for b in words
        for c in words[:2]
    ]
    file = tmp_path_factory.mktemp("labelled") / "labelled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def language_model(name, tiny, seed):
    if name == "causal-lm":
        return tiny("gpt2", seed=seed, n_layer=2 + 2 * (not seed))
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32)
    return BertForMaskedLM(
        BertConfig(vocab_size=27, max_position_embeddings=64, num_hidden_layers=2, **sizes)
    ).eval()


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
    return {name: value for name, value in batch.items() if name not in ("row", "position")}, batch["row"]


# ---- the teacher


@pytest.mark.parametrize("side", ["right", "left"])
def test_cached_targets_equal_live_ones(tiny, tokenizer, encoded, side, monkeypatch):
    monkeypatch.setattr(tokenizer, "padding_side", side)
    teacher = tiny("bert")
    inputs, rows = some_batch(tokenizer, encoded)
    ours = TeacherOutputs(
        teacher, EMBEDDING, tokenizer, encoded, Wanted(hidden=(0, 3)), batch_size=7
    ).in_memory()(inputs, rows)
    theirs = live(teacher, EMBEDDING, Wanted(hidden=(0, 3)))(inputs, rows)
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
    ours = TeacherOutputs(teacher, CLASSIFICATION, tokenizer, encoded).in_memory()(inputs, rows)
    assert ours.embedding is None
    torch.testing.assert_close(
        ours.logits, live(teacher, CLASSIFICATION)(inputs, rows).logits, atol=1e-6, rtol=0
    )


def test_a_cache_of_some_rows_knows_only_those(tiny, tokenizer, encoded):
    teacher = tiny("bert")
    inputs, rows = some_batch(tokenizer, encoded)
    some = TeacherOutputs(
        teacher, EMBEDDING, tokenizer, encoded, Wanted(hidden=(1,)), rows=[17, 3, 5, 0, 3]
    ).in_memory()
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


def test_the_size_of_a_cache_counts_real_tokens(tiny, tokenizer, encoded):
    tokens = sum(map(sum, encoded["attention_mask"][:5]))
    outputs = TeacherOutputs(
        tiny("bert"), EMBEDDING, tokenizer, encoded, Wanted(hidden=(0, 1)), rows=[0, 1, 2, 3, 4, 4]
    )
    assert outputs.size == 4 * 16 * (5 + 2 * tokens)


# ---- the terms


def test_equal_models_cost_nothing(tiny, tokenizer, encoded):
    teacher = tiny("bert")
    inputs, rows = some_batch(tokenizer, encoded)
    pairs = [(i, i) for i in range(4)]
    target = live(teacher, EMBEDDING, ALL)(inputs, rows)
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
        target = live(teacher, EMBEDDING, ALL)(inputs, torch.arange(4))
        outputs = EMBEDDING.forward(student, inputs, hidden_states=True)
        totals.append(loss_terms(outputs, target, LossWeights().model_dump(), [(i, i) for i in range(4)]))
    for name, value in totals[0].items():
        assert value.item() > 0
        assert totals[1][name].item() == pytest.approx(value.item(), rel=1e-4)


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
    target = live(model, EMBEDDING, Wanted(hidden=(2,)))(inputs, rows)
    assert loss_terms(outputs, target, {"hidden": 1}, [(2, 2)])["hidden"].item() == 0
    assert loss_terms(outputs, target, {"hidden": 1}, [(1, 2)])["hidden"].item() > 0
    # layer i writes hidden_states[i + 1]: the first entry is what the embeddings give
    assert torch.equal(target.hidden[2], outputs.hidden_states[3].detach())


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_queries_keys_and_values_give_the_attention_of_the_model(kind, tiny, batch_for):
    model = tiny(kind, attn_implementation="eager", num_hidden_layers=3)
    batch = batch_for(kind)
    with torch.no_grad(), capture(attention_maps(model, 1)) as caught:
        out = model(**batch, output_attentions=True, output_hidden_states=True)
    assert list(caught) == ["q", "k", "v"]
    assert not any(module._forward_hooks for module in attention_maps(model, 1).values())
    if kind == "llama":  # its keys are fewer, and turned by position afterwards
        assert caught["k"].shape[-1] == caught["q"].shape[-1] // 2
        return
    q, k = (caught[name].view(2, -1, 2, 8).transpose(1, 2) for name in "qk")
    scores = q @ k.transpose(2, 3) / 8**0.5
    if kind == "gpt2":
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(scores.softmax(-1), out.attentions[1])


# ---- layer maps


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (4, 4, [(0, 0), (1, 1), (2, 2), (3, 3)]),
        (3, 6, [(0, 1), (1, 3), (2, 5)]),
        (1, 6, [(0, 5)]),
        (2, 12, [(0, 5), (1, 11)]),
        (6, 2, [(0, 0), (1, 0), (2, 0), (3, 0), (4, 1), (5, 1)]),
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
    config = QUICK.model_copy(update={"steps": 25})
    history = distill(student, teacher, tokenizer, EMBEDDING, data, config, tmp_path, quiet=True)
    assert EMBEDDING.evaluate(student, tokenizer, data.test, teacher=teacher)["agreement"] > before + 0.1
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert {"embedding", "similarity", "hidden"} <= history[0].keys()
    assert all(torch.equal(value, reference[name]) for name, value in teacher.state_dict().items())
    assert not any(p.grad is not None for p in teacher.parameters())


def test_a_perfect_student_stays_as_it_is_under_every_term(tiny, tokenizer, data, tmp_path):
    teacher, student = tiny("bert"), tiny("bert")
    weights = LossWeights(relation=1)
    config = QUICK.model_copy(update={"weight_decay": 0.0, "weights": weights, "steps": 2})
    history = distill(student, teacher, tokenizer, EMBEDDING, data, config, tmp_path, quiet=True)
    assert {"embedding", "similarity", "hidden", "relation"} <= history[0].keys()
    # Cached targets differ from live ones by rounding, and Adam makes a step of any gradient.
    assert abs(history[0]["loss"]) < 1e-6


def test_cached_and_live_teachers_train_alike(tiny, tokenizer, data, tmp_path):
    losses = []
    for name, megabytes in (("cached", 4096), ("live", 0)):
        config = QUICK.model_copy(update={"cache_mb": megabytes, "batch_size": 32})
        student = tiny("bert", seed=1, num_hidden_layers=2)
        history = distill(
            student, tiny("bert"), tokenizer, EMBEDDING, data, config, tmp_path / name, quiet=True
        )
        losses.append([entry["loss"] for entry in history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_classification_is_learnt_from_logits(tokenizer, labelled, tmp_path):
    teacher, student = classifier(), classifier(layers=2, seed=1)
    with torch.no_grad():
        teacher.classifier.weight.mul_(50)  # so that it says both labels
    config = QUICK.model_copy(update={"steps": 40, "learning_rate": 1e-2})
    history = distill(student, teacher, tokenizer, CLASSIFICATION, labelled, config, tmp_path, quiet=True)
    assert {"logits", "hidden"} <= history[0].keys()
    assert history[-1]["logits"] < 0.5 * history[0]["logits"]


def test_a_student_with_fewer_layers(tiny, tokenizer, data, tmp_path):
    teacher, student = tiny("bert"), tiny("bert", num_hidden_layers=2)
    options: dict[str, Any] = {"layer_map": kept_layers([0, 2], 4), "quiet": True}
    assert distill(student, teacher, tokenizer, EMBEDDING, data, QUICK, tmp_path, **options)


def test_a_narrower_student_learns_through_maps_that_are_thrown_away(tiny, tokenizer, data, tmp_path):
    teacher, student = tiny("bert"), tiny("bert", hidden_size=8, num_hidden_layers=2, intermediate_size=16)
    names = set(student.state_dict())
    weights = LossWeights(embedding=0, similarity=0, relation=1)
    config = QUICK.model_copy(update={"weights": weights, "steps": 12, "save_every": 6, "ema_decay": 0.5})
    history = distill(student, teacher, tokenizer, EMBEDDING, data, config, tmp_path, quiet=True)
    assert history[-1]["hidden"] < history[0]["hidden"]
    assert set(student.state_dict()) == names
    # They are part of the checkpoints, so the run goes on from one, to the same end.
    again = tiny("bert", hidden_size=8, num_hidden_layers=2, intermediate_size=16)
    shutil.rmtree(tmp_path / "checkpoints/checkpoint-12")
    distill(again, teacher, tokenizer, EMBEDDING, data, config, tmp_path, quiet=True)
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in again.state_dict().items())


def test_labels_are_learnt_beside_the_teacher(tokenizer, labelled, tmp_path):
    teacher, student = classifier(), classifier(layers=2, seed=1)
    weights = LossWeights(hidden=0, logits=0, labels=1)
    slow = {"steps": 60, "adam_beta2": 0.999}
    config = QUICK.model_copy(update={"weights": weights, "train_embeddings": True, **slow})
    history = distill(student, teacher, tokenizer, CLASSIFICATION, labelled, config, tmp_path, quiet=True)
    assert set(history[0]) & {"logits", "hidden", "labels"} == {"labels"}
    assert history[-1]["labels"] < 0.85 * history[0]["labels"]


def test_equal_texts_with_different_labels_have_none(tokenizer, tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("text,label\na cat,yes\na dog,no\na cat,no\na dog,no\n")
    data: Any = CLASSIFICATION.read(file, split=(1, 0, 0))
    rows = questions(CLASSIFICATION, tokenizer, data, classifier().config, QUICK)
    labels = rows["labels"]
    assert len(rows) == 2
    assert labels == [-100, 0]


@pytest.mark.parametrize("name", ["masked-lm", "causal-lm"])
def test_language_models_are_compared_token_by_token(name, tiny, tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(
        "\n\n".join(f"the cat sits on a {w} mat in the park" for w in ["red", "blue", "big"] * 12)
    )
    task = get_task(name)
    data = task.read(file)
    teacher, student = (language_model(name, tiny, seed) for seed in (0, 1))
    weights = LossWeights(labels=0.1)
    config = QUICK.model_copy(update={"weights": weights, "train_embeddings": True, "top_k": 5})
    history = distill(student, teacher, tokenizer, task, data, config, tmp_path / "run", quiet=True)
    assert {"logits", "labels", "hidden"} <= history[0].keys()
    assert history[-1]["loss"] < history[0]["loss"]
    rows = questions(task, tokenizer, data, teacher.config, config)
    labels = rows["labels"]
    asked: Any = torch.tensor(labels[0]) != -100
    if name == "causal-lm":
        assert labels[0][:-1] == rows[0]["input_ids"][1:]
    else:
        assert 0 < asked.sum() < len(asked)
        again = questions(task, tokenizer, data, teacher.config, config)["labels"]
        assert list(again) == list(labels)  # drawn once, from the seed


def test_left_out_spans_are_compared_along_the_decoder(tiny, tmp_path):
    """An encoder-decoder of language is asked as translation is; kept answers and fresh ones train alike."""
    from layershare.pretrain.tokenizer import train_tokenizer

    file = tmp_path / "text.txt"
    texts = [f"the cat sits on a {w} mat in the park" for w in ["red", "blue", "big"] * 12]
    file.write_text("\n\n".join(texts))
    words = train_tokenizer(texts, "byte-level BPE", 400, sentinels=True, length=64)
    task = get_task("span-corruption")
    data = task.read(file)
    teacher = tiny("t5", vocab_size=len(words), pad_token_id=words.pad_token_id)
    student = tiny("t5", vocab_size=len(words), pad_token_id=words.pad_token_id, seed=1)
    weights = LossWeights(labels=0.1)
    config = QUICK.model_copy(update={"weights": weights, "train_embeddings": True})
    rows = questions(task, words, data, teacher.config, config)
    ends = set(words.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_1>"]))
    assert all(row["labels"][0] in ends and row["labels"][-1] == words.eos_token_id for row in rows)
    outputs = task.forward(student, task.collate(words, [rows[0], rows[1]]), hidden_states=True)
    assert outputs.logits.shape[1] == max(len(rows[i]["labels"]) for i in (0, 1)) < len(rows[0]["input_ids"])
    assert len(outputs.hidden_states) == 1 + 4 + 4
    live, cached = (
        distill(
            copy.deepcopy(student), teacher, words, task, data, config.model_copy(update={"cache_mb": size}),
            tmp_path / str(size), quiet=True,
        )
        for size in (0, 100)
    )  # fmt: skip
    assert {"logits", "labels", "hidden"} <= live[0].keys()
    assert live[-1]["loss"] < live[0]["loss"]
    assert [entry["loss"] for entry in cached] == pytest.approx([entry["loss"] for entry in live], rel=1e-3)
    before, after = (task.evaluate(one, words, data.test, teacher=teacher) for one in (student, teacher))
    assert before["agreement"] < after["agreement"] == 1
    assert before["perplexity"] > 0


def test_left_out_spans_are_shared_matched_and_compared(tiny, tmp_path):
    from layershare.adapt import AdaptConfig, MatchConfig, adapt, match
    from layershare.measure.compare import compare
    from layershare.pretrain.tokenizer import train_tokenizer
    from layershare.sharing.folder import share_folder

    file = tmp_path / "text.txt"
    texts = [f"the cat sits on a {w} mat in the park" for w in ["red", "blue", "big"] * 24]
    file.write_text("\n\n".join(texts))
    words = train_tokenizer(texts, "byte-level BPE", 400, sentinels=True, length=64)
    task, model = get_task("span-corruption"), tiny("t5", vocab_size=400, pad_token_id=words.pad_token_id)
    model.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    out = tmp_path / "shared"
    share_folder(
        tmp_path / "model", out, calibration=[file], task=task, unique=2, preset="adjacent", merge="regmean"
    )  # fmt: skip
    data = task.read(file)
    folders = {"model": tmp_path / "model", "shared": out}
    figures = compare(folders, task, data, batches=(1,), runs=2, seconds=0.05, memory=False, max_length=32)
    assert all(one.flops_per_text and one.metrics["perplexity"] for one in figures)
    assert len(sample_batches(task, words, data, model.config)[0]["labels"][0]) > 2
    pytest.importorskip("peft")
    config = MatchConfig(steps=2, batch_size=2, max_length=32)
    adapted = adapt(model, AdaptConfig(method="lora"))
    large = tiny("t5", vocab_size=400, pad_token_id=words.pad_token_id, seed=1)
    assert match(adapted, large, words, task, data, config, tmp_path, quiet=True)


def test_calibration_keeps_to_the_positions_of_the_model(tiny, tokenizer, tmp_path):
    file = tmp_path / "long.csv"
    rows = [f"{'the cat ' * 20}{'a ' * number}{w},{w}" for number in range(100) for w in ("dog", "man")]
    file.write_text("\n".join(["text,label", *rows]) + "\n")
    data, config = CLASSIFICATION.read(file), tiny("bert", max_position_embeddings=16).config
    batches = sample_batches(CLASSIFICATION, tokenizer, data, config, texts=40)
    assert all(batch["input_ids"].shape[1] == 16 for batch in batches)
    assert all("labels" not in batch for batch in batches)  # they need not be the model's
    config.label2id = {"dog": 0, "man": 1}
    told = sample_batches(CLASSIFICATION, tokenizer, data, config, labels=True)
    assert set(torch.cat([batch["labels"] for batch in told]).tolist()) == {0, 1}


@pytest.mark.parametrize("augment", [0.0, 0.3])
def test_an_interrupted_distillation_ends_with_the_same_bits(
    tiny, tokenizer, data, tmp_path, augment, monkeypatch
):
    config = QUICK.model_copy(update={"augment": augment, "save_every": 3, "dropout": True})
    sizes: dict[str, Any] = {"seed": 1, "num_hidden_layers": 2}
    whole, parts, teacher = tiny("bert", **sizes), tiny("bert", **sizes), tiny("bert", num_hidden_layers=2)
    distill(whole, teacher, tokenizer, EMBEDDING, data, config, tmp_path / "whole", quiet=True)

    class StoppedError(Exception):
        pass

    import layershare.heal.distill as module

    real = module.loss_terms
    calls: list[int] = []

    def failing(*args):
        calls.append(1)
        if len(calls) == 5:
            raise StoppedError
        return real(*args)

    folder = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(module, "loss_terms", failing)
        with pytest.raises(StoppedError):
            distill(tiny("bert", **sizes), teacher, tokenizer, EMBEDDING, data, config, folder, quiet=True)
    other = tiny("bert", num_hidden_layers=2, seed=2)
    with pytest.raises(TrainingError, match="the teacher differs"):
        distill(tiny("bert", **sizes), other, tokenizer, EMBEDDING, data, config, folder, quiet=True)
    distill(parts, teacher, tokenizer, EMBEDDING, data, config, folder, quiet=True)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in parts.state_dict().items())


@pytest.mark.parametrize("train_embeddings", [False, True])
def test_embedding_tables_move_only_when_asked(tiny, tokenizer, data, tmp_path, train_embeddings):
    student = tiny("bert", seed=1)
    before = student.embeddings.word_embeddings.weight.detach().clone()
    config = QUICK.model_copy(update={"train_embeddings": train_embeddings, "steps": 2})
    distill(student, tiny("bert"), tokenizer, EMBEDDING, data, config, tmp_path, quiet=True)
    assert torch.equal(student.embeddings.word_embeddings.weight, before) is not train_embeddings
    assert all(p.requires_grad for p in student.parameters())


def test_dropout_is_off_unless_asked_for(tiny, tokenizer, data, tmp_path):
    config = QUICK.model_copy(update={"steps": 1, "dropout": True, "train_embeddings": True})
    history = distill(tiny("bert"), tiny("bert"), tokenizer, EMBEDDING, data, config, tmp_path, quiet=True)
    assert history[0]["loss"] > 1e-3  # and without: see the perfect student


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(
    tiny, tokenizer, data, tmp_path, monkeypatch
):
    import layershare.heal.distill as module

    real, calls = module.loss_terms, []

    def spoilt(*args):
        calls.append(1)
        terms = real(*args)
        return terms if len(calls) <= 4 else {**terms, "hidden": terms["hidden"] * float("nan")}

    monkeypatch.setattr(module, "loss_terms", spoilt)
    config = QUICK.model_copy(update={"save_every": 2})
    with pytest.raises(TrainingError, match=r"step 5 \(term: hidden\).*Lower learning_rate.*kept in"):
        distill(tiny("bert", seed=1), tiny("bert"), tokenizer, EMBEDDING, data, config, tmp_path, quiet=True)
    good = load_file(tmp_path / "checkpoints/checkpoint-4/model.safetensors")
    assert all(bool(value.isfinite().all()) for value in good.values())


# ---- things that do not fit


def test_no_training_data(tiny, tokenizer, data, tmp_path):
    with pytest.raises(DataError, match="no training data"):
        distill(tiny("bert"), tiny("bert"), tokenizer, EMBEDDING, replace(data, train=None), QUICK, tmp_path)


def test_embeddings_of_different_width_cannot_be_compared(tiny, tokenizer, data, tmp_path):
    student = tiny("bert", hidden_size=8)
    with pytest.raises(ModelError, match=r"student 8, teacher 16.*weights\.embedding to 0"):
        distill(student, tiny("bert"), tokenizer, EMBEDDING, data, QUICK, tmp_path, quiet=True)


def test_models_with_other_vocabularies(tiny, tokenizer, data, tmp_path):
    with pytest.raises(ModelError, match=r"vocabularies differ: the student has 40 tokens, the teacher 27"):
        distill(tiny("bert", vocab_size=40), tiny("bert"), tokenizer, EMBEDDING, data, QUICK, tmp_path)
    small = tiny("bert", vocab_size=20)
    with pytest.raises(ModelError, match="tokenizer has 27 tokens, the models 20"):
        distill(small, small, tokenizer, EMBEDDING, data, QUICK, tmp_path)
    assert not list(tmp_path.iterdir())


def test_tokenizers_that_give_other_ids():
    class Words:
        def __init__(self, *words):
            self.words = words

        def get_vocab(self):
            return {word: i for i, word in enumerate(self.words)}

    check_processors(Words("a", "b"), Words("a", "b"))
    with pytest.raises(ModelError, match=r"differ in 2 tokens \(one is 'a'\)"):
        check_processors(Words("b", "a"), Words("a", "b"))


def test_a_layer_map_must_name_layers_that_are_there(tiny, tokenizer, data, tmp_path):
    with pytest.raises(OptionError, match="student layer 0 with teacher layer 4"):
        distill(tiny("bert"), tiny("bert"), tokenizer, EMBEDDING, data, QUICK, tmp_path, layer_map=[(0, 4)])


def test_a_teacher_with_other_labels(tokenizer, labelled, tmp_path):
    teacher, student = classifier(names=("good", "bad")), classifier()
    with pytest.raises(DataError, match="not one of the model's: good, bad"):
        distill(student, teacher, tokenizer, CLASSIFICATION, labelled, QUICK, tmp_path)
    with pytest.raises(
        ModelError, match="The labels differ: the student's are yes, no, the teacher's no, yes"
    ):
        distill(
            classifier(names=("yes", "no")),
            classifier(),
            tokenizer,
            CLASSIFICATION,
            labelled,
            QUICK,
            tmp_path,
        )
    with pytest.raises(ModelError, match="The student has 3 labels, the teacher 2"):
        distill(
            classifier(names=("no", "yes", "so")),
            classifier(),
            tokenizer,
            CLASSIFICATION,
            labelled,
            QUICK,
            tmp_path,
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0},
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"lambda_mse": -0.1},
        {"lambda_mse": math.inf},
        {"weights": {"labels": -1}},
        {"weights": {"hidden": math.nan}},
        {"augment": 1},
    ],
    ids=str,
)
def test_settings_out_of_range(wrong):
    name = next(iter(wrong))
    with pytest.raises(OptionError, match=f"{name}.*given"):
        DistillConfig.parse(wrong)


def test_labels_that_are_not_there(tiny, tokenizer, labelled, tmp_path):
    without = replace(labelled, train=labelled.train.remove_columns("label"))
    config = QUICK.model_copy(update={"weights": LossWeights(labels=1)})
    with pytest.raises(OptionError, match=r"weights\.labels is 1, but text-classification has no labels"):
        distill(classifier(), classifier(), tokenizer, CLASSIFICATION, without, config, tmp_path)


def test_relations_that_cannot_be(tiny, tokenizer, data, tmp_path):
    def attempt(**settings):
        config = QUICK.model_copy(update={"weights": LossWeights(relation=1), **settings})
        distill(tiny("bert"), tiny("bert"), tokenizer, EMBEDDING, data, config, tmp_path)

    with pytest.raises(OptionError, match="relation_heads 3 does not divide the student's hidden size 16"):
        attempt(relation_heads=3)
    with pytest.raises(OptionError, match="relation_layer 4: the teacher has the layers 0 to 3"):
        attempt(relation_layer=4)


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
