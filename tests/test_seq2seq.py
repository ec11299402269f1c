"""Translation and summarisation: pairs of texts through every verb, on tiny encoder-decoders of two families."""

import functools
import json
from typing import Any

import pytest
import torch

from layershare.adapt.folder import AdaptConfig, MatchConfig, adapt_folder
from layershare.compress import _Job
from layershare.errors import DataError, ModelError, OptionError
from layershare.finetune import FinetuneConfig, finetune
from layershare.heal.cache import TeacherOutputs
from layershare.heal.collator import Collator
from layershare.heal.distill import DistillConfig, distill
from layershare.heal.folder import heal_folder
from layershare.heal.layers import depths, layer_pairs
from layershare.heal.teacher import Wanted, live
from layershare.measure.compare import compare
from layershare.measure.evaluate import evaluate
from layershare.prune.config import PruneConfig
from layershare.prune.folder import prune_folder
from layershare.sharing import plan_of, verify
from layershare.sharing.folder import share_folder
from layershare.store.open import load_model
from layershare.tasks import get_task, seq2seq
from layershare.tasks.summarization import measure as rouge
from layershare.tasks.translation import measure as bleu

TRANSLATION: Any = get_task("translation")
FAMILIES = ["t5", "bart"]
WORDS = "cat dog man woman bird park house guitar song".split()  # noqa: SIM905
NEXT = dict(zip(WORDS, [*WORDS[1:], WORDS[0]], strict=True))


def model_of(family: str, tiny: Any, seed: int = 0, **sizes: Any) -> Any:
    """T5 starts its decoder with the padding token, BART with the end."""
    if family == "t5":
        return tiny("t5", seed=seed, **sizes)
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(seed)
    default: dict[str, Any] = dict(
        vocab_size=27, d_model=16, encoder_layers=4, decoder_layers=4, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=3,
    )  # fmt: skip
    return BartForConditionalGeneration(BartConfig(**default | sizes)).eval()


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Texts of one or two words, each word with another one for it in the other language: the next of a list."""
    import random

    draw = random.Random(0)
    rows = {" ".join(draw.choices(WORDS, k=draw.randrange(1, 3))) for _ in range(400)}
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = [json.dumps({"en": row, "de": " ".join(NEXT[w] for w in row.split())}) for row in sorted(rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def rows(file, tokenizer, family, tiny):
    """Their targets are longer than their texts."""
    train: Any = TRANSLATION.read(file).train
    longer = train.map(lambda row: {"target": f"the {row['target']}"})
    return TRANSLATION.encode(tokenizer, longer, 16, model_of(family, tiny).config)


def batch_of(rows, tokenizer, some=(0, 3, 5, 7)):
    found = [{**rows[row], "row": row, "position": i} for i, row in enumerate(some)]
    batch = Collator(tokenizer, collate=TRANSLATION.collate)(found)
    return {name: batch[name] for name in TRANSLATION.inputs}, batch["row"]


def folder_of(family, tiny, tokenizer, tmp_path, **sizes):
    folder = tmp_path / family
    model_of(family, tiny, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ---- rows and forward


def test_targets_end_once_and_are_no_part_of_the_text(rows, file):
    first = json.loads(file.read_text().splitlines()[0])
    data = TRANSLATION.read(file, split=(1, 0, 0))
    assert data.columns == {"text": "en", "target": "de"}
    assert data.train[0] == {"text": first["en"], "target": first["de"]}
    for row in rows:
        assert row["labels"].count(3) == 1
        assert row["labels"][-1] == 3
        assert set(row) == {"input_ids", "attention_mask", "labels"}


def test_an_end_is_put_where_the_tokenizer_leaves_it_out_and_there_is_room():
    assert seq2seq.ended([5, 6], 3, 8) == [5, 6, 3]
    assert seq2seq.ended([5, 3], 3, 8) == [5, 3]
    assert seq2seq.ended([5, 6], 3, 2) == [5, 6]
    assert seq2seq.ended([5, 6], None, 8) == [5, 6]


def test_logits_are_those_of_the_target_shifted_behind_the_start_token(rows, tokenizer, family, tiny):
    model = model_of(family, tiny)
    batch, _ = batch_of(rows, tokenizer)
    labels = batch["labels"]
    start = {"t5": 0, "bart": 3}[family]
    shifted = torch.cat([torch.full((len(labels), 1), start), labels[:, :-1].clamp(min=0)], 1)
    with torch.no_grad():
        ours: Any = TRANSLATION.forward(model, batch, hidden_states=True)
        theirs = model(
            batch["input_ids"], batch["attention_mask"], decoder_input_ids=shifted, use_cache=False
        )
    mask = labels != -100
    torch.testing.assert_close(ours.logits[mask], theirs.logits[mask])
    assert ours.target_mask.sum() == mask.sum()
    assert len(ours.hidden_states) == 1 + 4 + 4
    assert [ours.axis(layer) for layer in (0, 3, 4, 7)] == ["source", "source", "target", "target"]
    assert ours.hidden_states[4].shape[1] == batch["input_ids"].shape[1]
    assert ours.hidden_states[5].shape[1] == labels.shape[1]
    loss = TRANSLATION.loss(ours, labels)
    with torch.no_grad():
        torch.testing.assert_close(loss, model(**batch).loss)


def test_what_a_model_says_of_a_pair_does_not_depend_on_the_pairs_beside_it(rows, tokenizer, family, tiny):
    model = model_of(family, tiny)
    long = max(range(len(rows)), key=lambda row: len(rows[row]["labels"]))
    short = min(range(len(rows)), key=lambda row: len(rows[row]["labels"]))
    alone, beside = (batch_of(rows, tokenizer, some)[0] for some in ([short], [short, long]))
    with torch.no_grad():
        ours, theirs = (TRANSLATION.forward(model, batch, hidden_states=True) for batch in (alone, beside))
    width = alone["labels"].shape[1]
    assert beside["labels"].shape[1] > width
    torch.testing.assert_close(ours.logits[0], theirs.logits[0, :width], atol=1e-5, rtol=1e-5)


# ---- distillation


@pytest.mark.parametrize("top", [0, 5])
def test_outputs_from_disk_equal_live_ones_in_encoder_and_decoder(
    rows, tokenizer, family, tiny, tmp_path, top
):
    teacher = model_of(family, tiny)
    wanted = Wanted(hidden=(1, 3, 4, 7), relations=3, top=top)
    outputs = TeacherOutputs(teacher, TRANSLATION, tokenizer, rows, wanted, batch_size=16)
    kept = outputs.on_disk(tmp_path)
    inputs, numbers = batch_of(rows, tokenizer)
    ours, theirs = kept(inputs, numbers), live(teacher, TRANSLATION, wanted)(inputs, numbers)
    source, target = inputs["attention_mask"].bool(), inputs["labels"] != -100
    assert list(ours.hidden) == [1, 3, 4, 7]
    for layer, values in theirs.hidden.items():
        mask = source if layer < 4 else target
        torch.testing.assert_close(ours.hidden[layer][mask], values[mask], atol=1e-5, rtol=0)
    for name, values in theirs.relations.items():
        torch.testing.assert_close(ours.relations[name][source], values[source], atol=1e-5, rtol=0)
    if top:
        torch.testing.assert_close(ours.logits.rest[target], theirs.logits.rest[target], atol=1e-5, rtol=0)
    else:
        torch.testing.assert_close(ours.logits[target], theirs.logits[target], atol=1e-5, rtol=0)
    lengths = sum(len(ids) for ids in rows["labels"])
    assert outputs.streams["hidden-7"].size(lengths) == lengths * 16 * 4
    again = TeacherOutputs(teacher, TRANSLATION, tokenizer, rows.select(range(9)), wanted).key()
    assert again != outputs.key()


def test_layers_are_paired_within_encoder_and_within_decoder(family, tiny):
    two = (
        {"num_layers": 2, "num_decoder_layers": 1}
        if family == "t5"
        else {"encoder_layers": 2, "decoder_layers": 1}
    )
    student, teacher = model_of(family, tiny, **two), model_of(family, tiny)
    assert depths(student) == (2, 1)
    assert layer_pairs(student, teacher, None) == [(0, 1), (1, 3), (2, 7)]
    assert layer_pairs(student, teacher, [(2, 4)]) == [(2, 4)]
    with pytest.raises(OptionError, match="different parts of the models"):
        layer_pairs(student, teacher, [(1, 4)])
    with pytest.raises(OptionError, match="the student has 3 layers and the teacher 8"):
        layer_pairs(student, teacher, [(3, 4)])


def test_an_equal_student_stays_as_it_is_under_every_term(file, tokenizer, family, tiny, tmp_path):
    data = TRANSLATION.read(file)
    weights = {"logits": 1, "hidden": 1, "relation": 1, "labels": 0}
    config = DistillConfig.parse({"steps": 3, "batch_size": 8, "weights": weights, "learning_rate": 1e-9})
    student, teacher = model_of(family, tiny), model_of(family, tiny)
    history = distill(student, teacher, tokenizer, TRANSLATION, data, config, tmp_path, quiet=True)
    assert {"logits", "hidden", "relation"} <= history[0].keys()
    assert history[-1]["loss"] < 1e-6


# ---- the verbs, one after the other


def test_a_model_learns_is_shared_distilled_adapted_pruned_and_judged(
    file, tokenizer, family, tiny, tmp_path, monkeypatch
):
    quick = functools.partial(compare, batches=(1,), runs=2, seconds=0.05, memory=False)
    monkeypatch.setattr("layershare.measure.evaluate.compare", quick)
    wide = {"d_model": 32} | ({"d_kv": 16} if family == "t5" else {"init_std": 0.1})
    start = folder_of(family, tiny, tokenizer, tmp_path, **wide)
    task = get_task("translation", {"num_beams": 1, "max_new_tokens": 6})
    config = FinetuneConfig(
        steps=160,
        batch_size=32,
        learning_rate=4e-3,
        judge_every=160,
        max_length=16,
        dropout=False,
        judge_rows=8,
    )
    result = finetune(start, file, tmp_path / "teacher", task=task, config=config, quiet=True)
    before, after = (model.metrics for model in result.models)
    assert result.metric == "bleu"
    assert after.keys() >= {"bleu", "chrf", "perplexity"}
    assert after["perplexity"] < before["perplexity"] / 4
    assert after["chrf"] > before["chrf"] + 30

    share_folder(tmp_path / "teacher", tmp_path / "shared", preset="adjacent", unique=2)
    shared: Any = load_model(tmp_path / "shared", task.auto_class)
    assert [len(stack.groups) for stack in plan_of(shared).stacks] == [2, 2]
    settings = DistillConfig(steps=80, batch_size=32, max_length=16, learning_rate=5e-3)
    healed = heal_folder(
        tmp_path / "shared", tmp_path / "teacher", task, [file], tmp_path / "distilled", config=settings,
        cache=tmp_path / "cache",
    )  # fmt: skip
    assert list((tmp_path / "cache").rglob("*.npy"))
    figures = {model.label: model.metrics for model in healed.models}
    assert figures["distilled"]["agreement"] > figures["before"]["agreement"] + 0.1
    assert verify(load_model(tmp_path / "distilled", task.auto_class)).tied > 0

    training = MatchConfig(steps=4, batch_size=8, max_length=16)
    for name, large in (("learnt", None), ("matched", tmp_path / "teacher")):
        adapt_folder(
            tmp_path / "distilled", task, [file], tmp_path / name, config=AdaptConfig(method="lora"),
            training=training, teacher=large,
        )  # fmt: skip
    cut = PruneConfig.parse({"what": "neurons", "amount": 0.25, "by": "taylor"})
    prune_folder(tmp_path / "distilled", cut, tmp_path / "pruned", task=task, data=[file])
    names = ["teacher", "distilled", "learnt", "pruned"]
    judged = evaluate({name: tmp_path / name for name in names}, task, [file], seed=0)
    assert [model.label for model in judged.models] == names
    assert judged.metric == "bleu"
    assert judged.models[0].metrics["chrf"] > before["chrf"] + 30
    assert judged.models[1].layer_parameters_unique < 0.55 * judged.models[0].layer_parameters_unique


# ---- writing, and figures


def test_settings_reach_generate(file, tokenizer, family, tiny):
    model = model_of(family, tiny, seed=2).train()  # one that writes something
    texts = TRANSLATION.texts(TRANSLATION.read(file))[:6]

    def write(**settings):
        return seq2seq.write(model, tokenizer, texts, seq2seq.Settings.parse(settings), batch_size=4)

    with torch.no_grad():
        ids = tokenizer(texts[2], return_tensors="pt")["input_ids"]
        alone = model.eval().generate(ids, max_new_tokens=5)[0]
        model.train()
    assert write(max_new_tokens=5)[2] == tokenizer.decode(alone, skip_special_tokens=True).strip()
    short, long = write(max_new_tokens=1), write(max_new_tokens=5)
    assert all(len(line.split()) <= 1 for line in short)
    assert any(long)
    sampled = write(generation={"do_sample": True})
    assert sampled == write(generation={"do_sample": True}) != write()
    assert any(sampled)
    assert model.training
    with pytest.raises(OptionError, match=r"unknown key 'num_beam'.*Did you mean 'num_beams'"):
        write(num_beam=2)
    with pytest.raises(OptionError, match=r"generation: unknown key 'lenght_penalty'.*length_penalty"):
        write(generation={"lenght_penalty": 2})
    for many in ({"num_return_sequences": 2, "num_beams": 2}, {"return_dict_in_generate": True}):
        with pytest.raises(OptionError, match=f"{next(iter(many))} is not for this task"):
            write(generation=many)


def test_a_prefix_is_put_before_every_text(file, tokenizer, family, tiny):
    task = get_task("translation", {"prefix": "the big ", "target_length": 2})
    data = TRANSLATION.read(file, split=(1, 0, 0))
    config = model_of(family, tiny).config
    plain, with_prefix = (one.encode(tokenizer, data.train, 16, config) for one in (TRANSLATION, task))
    the, big = tokenizer.convert_tokens_to_ids(["the", "big"])
    assert with_prefix[0]["input_ids"] == [2, the, big, *plain[0]["input_ids"][1:]]
    assert with_prefix[0]["labels"] == [*plain[0]["labels"][:1], 3]


def test_a_run_with_other_settings_of_its_task_is_another_run(file, tokenizer, tiny, tmp_path):
    folder = folder_of("t5", tiny, tokenizer, tmp_path)
    tasks = [get_task("translation", settings) for settings in ({}, {"num_beams": 1}, {"prefix": "the "})]
    runs = [_Job(folder, task, task.read(file), 1, 0, print).inputs({}) for task in tasks]
    assert [run["setting of the task"] for run in runs] == [{}, {"num_beams": 1}, {"prefix": "the "}]


def test_a_checkpoint_without_all_of_its_layers_is_not_trained(file, tokenizer, tiny, tmp_path):
    folder = folder_of("t5", tiny, tokenizer, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 5}))
    with pytest.raises(ModelError, match=r"lacks encoder\.block\.4"):
        finetune(folder, file, tmp_path / "out", task="translation", quiet=True)


def test_bleu_chrf_and_rouge_by_hand():
    figures = bleu("13a", ["a cat sits on the mat", "b"], ["a cat sits on the mat", "b"])
    assert figures == pytest.approx({"bleu": 100, "chrf": 100})
    assert bleu("13a", ["x y z w"], ["a b c d"])["bleu"] < 20
    with pytest.raises(OptionError, match="no tokenizer '13b'"):
        bleu("13b", ["a"], ["a"])
    # 2 of 3 words of each side are in the other; one of two pairs; the longest common run in order has 2
    assert rouge(False, ["the cat sat"], ["the cat ran"]) == pytest.approx(
        {"rouge1": 200 / 3, "rouge2": 50, "rougeL": 200 / 3}
    )
    assert rouge(True, ["running cats"], ["run cat"])["rouge1"] == pytest.approx(100)
    assert rouge(False, ["running cats"], ["run cat"])["rouge1"] == 0


def test_summaries_are_judged_by_rouge(tmp_path, tokenizer, tiny):
    file = tmp_path / "x.csv"
    file.write_text(
        "description,synopsis\nthe cat sits on the mat,the cat\nthe dog runs in the park,the dog\n"
    )
    task = get_task("summarization")
    data: Any = task.read(file, split=(1, 0, 0))
    assert data.columns == {"text": "description", "target": "synopsis"}
    figures = task.evaluate(model_of("bart", tiny), tokenizer, data.train, teacher=model_of("bart", tiny))
    assert figures.keys() == {"rouge1", "rouge2", "rougeL", "perplexity", "agreement"}
    assert figures["agreement"] == 1
    assert task.metric_of(data.train) == "rougeL"


# ---- bad input


def test_only_an_encoder_decoder_will_do(file, bert_folder, tiny, tmp_path):
    with pytest.raises(ModelError, match="bert model has no decoder beside its encoder"):
        TRANSLATION.check(TRANSLATION.read(file), tiny("bert").config)
    with pytest.raises(ModelError):
        finetune(bert_folder, file, tmp_path / "out", task="translation", quiet=True)


def test_a_target_that_is_missing_is_named(tmp_path):
    file = tmp_path / "x.tsv"
    file.write_text("en\tde\na cat\teine Katze\na dog\t \n")
    with pytest.raises(DataError, match=r"x\.tsv, line 3, column 'de': is empty"):
        TRANSLATION.read(file)
    file.write_text("english\tgerman\na\tb\n")
    with pytest.raises(DataError, match=r"no column for the text .*has english, german.*--column text=NAME"):
        TRANSLATION.read(file)


def test_a_task_without_settings_refuses_them():
    with pytest.raises(OptionError, match=r"text-classification has no settings of its own .*num_beams"):
        get_task("text-classification", {"num_beams": 2})
