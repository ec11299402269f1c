"""Pretraining: streams, packing, what is to be guessed, and runs that learn, stay tied and survive being killed."""

import json
import math
import os
import signal
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors import safe_open
from transformers import AutoModelForMaskedLM, AutoTokenizer

import layershare
from layershare.errors import DataError, LayershareError, ModelError, OptionError
from layershare.pretrain import PretrainConfig, pretrain
from layershare.pretrain import run as running
from layershare.pretrain.start import build, find_start, objective_for
from layershare.pretrain.tokenizer import open_tokenizer, train_tokenizer
from layershare.result import Result
from layershare.tasks import causal_lm, get_task, masked_lm, span_corruption
from layershare.tasks.corpus import PIECE, documents, read_corpus
from layershare.tasks.language import Guessing, draws, guess_loss, judge, words_of
from layershare.tasks.masking import corrupt_spans, mask_tokens, noise_spans, spans_of
from layershare.tasks.packing import Frame, Packed, framed, pack, tokens_of, write_tokens

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
CONFIG = PretrainConfig(
    steps=60, batch_size=8, block_size=32, learning_rate=5e-3, vocabulary=80, judged_blocks=16, save_every=20
)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """400 paragraphs that follow a rule: each sentence repeats one of six patterns."""
    draw = np.random.default_rng(0)
    nouns, verbs = (
        ["cat", "dog", "bird", "man", "girl", "fish"],
        ["sits", "runs", "sings", "eats", "sleeps", "swims"],
    )
    paragraphs = []
    for number in range(400):
        picks = draw.integers(6, size=6)
        paragraphs.append(f"{number} " + " ".join(f"the {nouns[i]} always {verbs[i]}." for i in picks))
    file = tmp_path_factory.mktemp("toy") / "toy.txt"
    file.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return file


# ---- documents


def test_a_paragraph_is_a_document_and_a_long_one_is_cut_at_a_line(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n \n\nthree\n")
    assert list(documents(file)) == ["one\ntwo", "three"]
    line = "x" * 999
    file.write_text("\n".join([line] * 3000))
    parts = list(documents(file))
    assert len(parts) == 3
    assert all(len(part) <= PIECE + 4000 for part in parts)
    assert sum(part.count(line) for part in parts) == 3000


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_give_their_text_column_as_a_stream(tmp_path, suffix):
    texts = ["a, b", 'she said "no"', "c"]
    file = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"id": [1, 2, 3], "Text": texts}), file)
    elif suffix == "jsonl":
        file.write_text("\n".join(json.dumps({"id": 1, "Text": text}) for text in texts))
    elif suffix == "csv":
        file.write_text('id,Text\n1,"a, b"\n2,"she said ""no"""\n3,c\n')
    else:
        file.write_text("id\tText\n" + "\n".join(f"1\t{text}" for text in texts))
    assert list(documents(file)) == texts


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"\n \n", "is empty"),
        ("a.txt", b"good\nb\xe9d", "line 2: byte 0xe9 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2: not JSON"),
        ("a.jsonl", b'{"text": 5}', "line 1, column 'text': expected a text"),
        ("a.csv", b"txet\nabc", "no column for the text"),
        ("a.csv", b"text,b\nabc", "line 2: 1 columns where the header has 2"),
        ("a.doc", b"abc", "format from the suffix"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        list(documents(tmp_path / name))
    assert name in str(error.value)


def test_parts_are_exact_shares_have_nothing_in_common_and_hold_all(tmp_path):
    texts = [f"text {i % 150}" for i in range(200)]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    corpus = read_corpus(tmp_path / "a.txt", split=(0.8, 0.1, 0.1), seed=3)
    parts = {part: list(corpus.stream(part)) for part in ("train", "validation", "test")}
    assert {part: len(set(rows)) for part, rows in parts.items()} == {
        "train": 120,
        "validation": 15,
        "test": 15,
    }
    assert {part: len(rows) for part, rows in parts.items()} == corpus.documents
    assert Counter(row for rows in parts.values() for row in rows) == Counter(texts)
    again = read_corpus(tmp_path / "a.txt", split=(0.8, 0.1, 0.1), seed=4)
    assert set(again.stream("test")) != set(parts["test"])


def test_what_a_held_out_file_has_is_not_trained_on(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\nTwo  words\n\nthree")
    (tmp_path / "b.txt").write_text("two words\n\nfour")
    corpus = read_corpus(tmp_path / "a.txt", validation=tmp_path / "b.txt", split=(1, 0, 0))
    assert list(corpus.stream("train")) == ["one", "three"]
    assert list(corpus.stream("validation")) == ["two words", "four"]
    assert corpus.notes[0].startswith("1 of 3 train documents are also in files for")
    (tmp_path / "c.txt").write_text("Four\n\nfive")
    files = {"validation": tmp_path / "b.txt", "test": tmp_path / "c.txt"}
    corpus = read_corpus(tmp_path / "a.txt", **files, split=(1, 0, 0))
    assert [list(corpus.stream(part)) for part in ("train", "validation", "test")] == [
        ["one", "three"], ["two words"], ["Four", "five"]
    ]  # fmt: skip
    with pytest.raises(DataError, match="Every document"):
        read_corpus(tmp_path / "a.txt", validation=tmp_path / "a.txt")


# ---- packing


def test_packed_blocks_are_the_joined_documents_cut_and_nothing_else(tokenizer, tmp_path):
    texts = ["the cat sits", "a dog", "the bird sings on a man"] * 4
    frame = framed(tokenizer)
    assert frame == Frame((2,), (3,), 3)
    flat = [token for text in texts for token in (*tokenizer(text, add_special_tokens=False)["input_ids"], 3)]
    blocks = pack(tokenizer, texts, frame, 9)
    assert [token for block in blocks for token in block[1:-1]] == flat
    assert all(block[0] == 2 and block[-1] == 3 and len(block) == 9 for block in blocks[:-1])
    assert tokenizer.pad_token_id not in {token for block in blocks for token in block}
    stream = tokens_of(tokenizer, iter(texts), 3, batch=2)
    assert write_tokens(tmp_path / "t.npy", stream, 300, "key") == len(flat)
    packed = Packed(tmp_path / "t.npy", frame, 9)
    whole = [block for block in blocks if len(block) == 9]
    assert list(packed["input_ids"][:]) == whole
    assert [packed[i]["input_ids"] for i in range(len(packed))] == whole
    assert write_tokens(tmp_path / "t.npy", iter(()), 300, "key") == len(flat)  # found again
    assert write_tokens(tmp_path / "t.npy", iter([[70000]]), 70001, "other") == 1
    assert np.load(tmp_path / "t.npy").tolist() == [70000]


def test_blocks_for_a_causal_model_begin_as_a_text_does_and_end_anywhere(tokenizer, toy):
    texts = ["the cat sits", "a dog", "the bird sings on a man"] * 4
    bare = train_tokenizer(documents(toy), "byte-level BPE", 300)
    assert causal_lm.frame(bare) == Frame((), (), bare.eos_token_id)
    assert causal_lm.frame(tokenizer) == Frame((2,), (), 3)
    blocks = causal_lm.encode(tokenizer, Dataset.from_dict({"text": texts}), 9)["input_ids"]
    flat = [token for text in texts for token in (*tokenizer(text, add_special_tokens=False)["input_ids"], 3)]
    assert all(block[0] == 2 and len(block) == 9 for block in blocks[:-1])
    assert [token for block in blocks for token in block[1:]] == flat


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_packed_loss_is_the_unpacked_loss_of_the_same_tokens(tiny, tokenizer, kind):
    model = tiny(kind)
    documents = [[5, 6, 7, 8, 9, 3], [10, 11, 3], [12, 13, 14, 15, 16, 17, 3]]
    flat = [token for ids in documents for token in ids]
    words = words_of(tokenizer, model.config)
    assert words.separator == 3

    def losses(guessing):
        batch = causal_lm.batch([flat], [], words, guessing)
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = causal_lm.TASK.forward(model, batch).logits
        return F.cross_entropy(logits[0], labels[0], ignore_index=-100, reduction="none"), labels[0]

    apart, labels = losses(Guessing(separate=True))
    alone = []
    for ids in documents:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        alone += [*F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").tolist(), 0.0]
    torch.testing.assert_close(apart, torch.tensor(alone), atol=1e-5, rtol=1e-5)
    assert labels[5] == labels[8] == -100  # nobody is asked for the first token of the next document
    together, labels = losses(Guessing())
    with torch.no_grad():
        theirs = model(torch.tensor([flat]), labels=torch.tensor([flat])).loss
    assert float(together[:-1].mean()) == pytest.approx(float(theirs), rel=1e-5)
    assert not torch.allclose(together[6:8], apart[6:8])


# ---- what is to be guessed


def test_masking_is_15_percent_and_80_10_10():
    special = np.zeros(1000, dtype=bool)
    special[:5] = True
    ids = np.random.default_rng(1).integers(0, 1000, 200_000)
    masked, labels = (np.array(x) for x in mask_tokens(ids.tolist(), special, 4, np.random.default_rng(7)))
    asked = labels != -100
    assert not asked[ids < 5].any()
    assert (labels[asked] == ids[asked]).all()
    assert (masked[~asked] == ids[~asked]).all()
    ordinary = int((ids >= 5).sum())

    def within(count, total, share):
        return abs(count - share * total) < 4 * math.sqrt(total * share * (1 - share))

    count = int(asked.sum())
    assert within(count, ordinary, 0.15)
    assert within(int((masked[asked] == 4).sum()), count, 0.8)
    stays = 0.1 + 0.1 / 995  # a token drawn at random may be the same
    assert within(int((masked[asked] == ids[asked]).sum()), count, stays)
    other = asked & (masked != 4) & (masked != ids)
    assert within(int(other.sum()), count, 0.1 * 994 / 995)
    assert masked[other].min() >= 5
    again = mask_tokens(ids.tolist(), special, 4, np.random.default_rng(7))
    assert again == (masked.tolist(), labels.tolist())


def test_at_least_one_token_is_asked_for():
    special = np.zeros(10, dtype=bool)
    special[0] = True
    for seed in range(50):
        _, labels = mask_tokens([0, 5, 6, 0], special, 1, np.random.default_rng(seed), rate=0.01)
        assert sum(label != -100 for label in labels) >= 1
    assert mask_tokens([0, 0], special, 1, np.random.default_rng(0)) == ([0, 0], [-100, -100])


def test_span_corruption_by_hand():
    # "Thank you for inviting me to your party last week" of the paper's figure, token by token
    ids = list(range(10, 20))
    noise = np.array([0, 0, 1, 1, 0, 0, 0, 0, 1, 0], dtype=bool)
    left, target = corrupt_spans(ids, noise, [99, 98, 97], end=1)
    assert left == [10, 11, 99, 14, 15, 16, 17, 98, 19, 1]
    assert target == [99, 12, 13, 98, 18, 1]


@pytest.mark.parametrize("length", [8, 33, 128, 512])
def test_spans_have_the_numbers_of_the_paper_and_lose_nothing(length):
    sentinels = list(range(10_000, 10_100))
    sizes = set()
    for seed in range(20):
        noise = noise_spans(length, np.random.default_rng(seed))
        runs = np.flatnonzero(np.diff(noise.astype(int), prepend=0) == 1)
        assert noise.sum() == max(1, round(0.15 * length))
        assert len(runs) == spans_of(length)
        assert not noise[0]
        ids = list(range(length))
        left, target = corrupt_spans(ids, noise, sentinels, end=-1)
        sizes.add((len(left), len(target)))
        spans = {}
        for token in target[:-1]:
            if token in sentinels:
                current = spans.setdefault(token, [])
            else:
                current.append(token)
        assert [t for token in left[:-1] for t in spans.get(token, [token])] == ids
    assert len(sizes) == 1  # so that nothing needs padding


# ---- tokenizers


def test_trained_tokenizers_are_of_the_right_kind_and_come_back(toy, tmp_path):
    bytewise = train_tokenizer(documents(toy), "byte-level BPE", 300, sentinels=True, length=64)
    text = "naïve 🐟 <tab>\t the cat\n"
    assert bytewise.decode(bytewise(text, add_special_tokens=False)["input_ids"]) == text
    assert bytewise("cat")["input_ids"][-1] == bytewise.eos_token_id
    assert bytewise.convert_tokens_to_ids("<extra_id_99>") in bytewise.all_special_ids
    pieces = train_tokenizer(documents(toy), "WordPiece", 100, length=64)
    ids = pieces("The CAT")["input_ids"]
    assert pieces.convert_ids_to_tokens(ids)[:2] == ["[CLS]", "the"]
    assert pieces.decode(ids) == "[CLS] the cat [SEP]"
    assert len(pieces) <= 100
    pieces.save_pretrained(tmp_path)
    again = open_tokenizer(tmp_path)
    assert again.get_vocab() == pieces.get_vocab()
    assert (again.mask_token_id, again.model_max_length) == (pieces.mask_token_id, 64)


# ---- what it begins with


def test_a_start_is_a_type_a_file_or_a_checkpoint(tmp_path, bert_folder):
    kind = find_start("gpt2", {"n_layer": 3, "hidden_size": 8})
    assert (kind.config.num_hidden_layers, kind.config.n_embd, kind.checkpoint) == (3, 8, None)
    (tmp_path / "my.json").write_text(json.dumps({"model_type": "bert", **SIZES, "vocab_size": 77}))
    file = find_start(tmp_path / "my.json", {"hidden_size": 16})
    assert (file.config.hidden_size, file.config.num_hidden_layers, file.vocabulary) == (16, 4, 77)
    assert find_start(bert_folder).checkpoint == bert_folder
    assert objective_for(kind.config) == "causal"
    assert objective_for(file.config) == "masked"
    assert objective_for(find_start("t5").config) == "span"
    assert objective_for(find_start("bert", {"is_decoder": True}).config) == "causal"


@pytest.mark.parametrize(
    ("model", "overrides", "error", "says"),
    [
        ("bert", {"hiden_size": 8}, OptionError, "Did you mean 'hidden_size'"),
        ("bert", {"hidden_size": "eight"}, OptionError, "is like 768"),
        ("bert", {"hidden_size": 30, "num_attention_heads": 7}, ModelError, "no model can be made"),
        ("brt", {}, ModelError, "Did you mean 'bert'"),
        ("no/where", {}, ModelError, "no/where"),
    ],
)
def test_a_wrong_start_says_what_is_meant(model, overrides, error, says, tokenizer):
    with pytest.raises(error, match=says):
        build(find_start(model, overrides), masked_lm.OBJECTIVE, tokenizer, 0)


# ---- whole runs


@pytest.fixture(scope="session")
def shared_run(toy, tmp_path_factory):
    """A BERT of four layers that share two from the start, trained on the toy text."""
    out = tmp_path_factory.mktemp("run") / "bert"
    plan = {"preset": "cycle", "unique": 2}
    return out, pretrain("bert", toy, out, overrides=SIZES, plan=plan, config=CONFIG, quiet=True)


def weights(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_that_shares_from_the_start_learns_stays_tied_and_is_saved_once(shared_run):
    out, result = shared_run
    before, after = result.models
    assert after.metrics["perplexity"] < 0.6 * before.metrics["perplexity"]
    assert result.history[-1]["loss"] < 0.8 * result.history[0]["loss"]
    model = AutoModelForMaskedLM.from_pretrained(out)
    assert layershare.verify(model).tied > 0
    assert after.layer_parameters_unique < 0.55 * after.layer_parameters_effective
    assert sum(value.numel() for value in weights(out).values()) == sum(p.numel() for p in model.parameters())
    assert layershare.plan_of(model).to_dict() == layershare.SharingPlan.load(out / "plan.toml").to_dict()
    assert sorted(path.name for path in out.parent.iterdir()) == ["bert"]
    assert not {"work", "checkpoints"} & {path.name for path in out.iterdir()}
    assert Result.load(out) == result


def test_the_saved_model_has_the_perplexity_that_the_result_says(shared_run, toy):
    out, result = shared_run
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    held = read_corpus(toy, split=(0.95, 0.05, 0)).stream("validation")
    blocks = [block for block in pack(tokenizer, held, framed(tokenizer), 32) if len(block) == 32][:16]
    words = words_of(tokenizer, model.config)
    assert judge(model, blocks, masked_lm.OBJECTIVE, words, Guessing()) == pytest.approx(
        result.models[1].metrics
    )
    agreement = judge(model, blocks, masked_lm.OBJECTIVE, words, Guessing(), teacher=model)["agreement"]
    assert agreement == 1


def test_random_layers_are_not_averaged(tokenizer):
    net = build(find_start("bert", SIZES), masked_lm.OBJECTIVE, tokenizer, 0)
    plan = running._planned(net, {"preset": "cycle", "unique": 1}, fresh=True)
    shared = layershare.share(net, plan)
    weight = shared.bert.encoder.layer[3].attention.self.query.weight
    assert weight is shared.bert.encoder.layer[0].attention.self.query.weight
    assert torch.equal(weight, net.bert.encoder.layer[0].attention.self.query.weight)


def killed_in(child):
    """Run ``child`` in a forked process and wait until it has been killed."""
    process = os.fork()
    if process == 0:
        try:
            child()
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


@pytest.mark.parametrize("at", [7, 14])
def test_a_killed_run_ends_with_the_same_bits(toy, tmp_path, monkeypatch, at):
    config = CONFIG.model_copy(update={"steps": 16, "save_every": 5})

    def go(name):
        return pretrain(
            "gpt2", toy, tmp_path / name, overrides={"n_embd": 16, "n_layer": 2, "n_head": 2},
            config=config.model_copy(update={"vocabulary": 300}), quiet=True,
        )  # fmt: skip

    whole = go("whole")
    calls = []

    def deadly(logits, labels):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return guess_loss(logits, labels)

    with monkeypatch.context() as patch:
        patch.setattr(running, "guess_loss", deadly)
        killed_in(lambda: go("parts"))
    assert (tmp_path / "parts.part/checkpoints/checkpoint-5").is_dir()
    torch.manual_seed(99)
    resumed = go("parts")
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert resumed.history == whole.history
    assert [model.metrics for model in resumed.models] == [model.metrics for model in whole.models]


def test_span_corruption_trains_an_encoder_decoder_from_a_checkpoint_on(toy, tmp_path):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2}
    config = CONFIG.model_copy(update={"steps": 6, "vocabulary": 420, "judged_blocks": 4})
    first = pretrain("t5", toy, tmp_path / "a", overrides=sizes, config=config, quiet=True)
    assert first.task == "span-corruption"
    more = config.model_copy(update={"vocabulary": 0})
    second = pretrain(tmp_path / "a", toy, tmp_path / "b", plan={"preset": "all"}, config=more, quiet=True)
    assert layershare.verify(layershare.store.open.load_model(tmp_path / "b")).tied > 0
    assert second.models[1].metrics["perplexity"] < first.models[0].metrics["perplexity"]


def test_language_models_are_evaluated_like_every_other_task(shared_run, toy):
    out, _ = shared_run
    task = get_task("masked-lm")
    data = task.read(toy, split=(0.9, 0.0, 0.1))
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    figures = task.evaluate(model, tokenizer, data.test, max_length=32, teacher=model)
    assert figures["perplexity"] < 40
    assert figures["agreement"] == 1
    assert task.metric_of(data.test) == "perplexity"
    rows = task.encode(tokenizer, data.train.select(range(9)), 32)
    assert {len(ids) for ids in rows["input_ids"][:-1]} == {32}
    assert get_task("causal-lm").auto_class == "AutoModelForCausalLM"


# ---- bad input


@pytest.mark.parametrize(
    ("change", "settings", "says"),
    [
        ({}, {"block_size": 1024}, "block_size 1024 is more than the 512"),
        ({}, {"objective": "span"}, "Objective 'span' is not for bert"),
        ({}, {"separate": True}, "separate is for causal models"),
        ({"tokenizer": "nowhere/at-all"}, {"vocabulary": 0}, "nowhere/at-all"),
        (
            {"overrides": {**SIZES, "vocab_size": 9}, "tokenizer": True},
            {"vocabulary": 0},
            "a vocab_size of 9",
        ),
        ({"plan": {"preset": "cycle", "unique": 9}}, {}, "9"),
    ],
)
def test_wrong_settings_are_told_before_training(toy, tmp_path, bert_folder, change, settings, says):
    change = {**change, **({"tokenizer": bert_folder} if change.get("tokenizer") is True else {})}
    given = {"overrides": SIZES, **change}
    with pytest.raises(LayershareError, match=says):
        pretrain(
            "bert", toy, tmp_path / "out", config=CONFIG.model_copy(update=settings), quiet=True, **given
        )
    assert not (tmp_path / "out").exists()


def test_too_little_text_and_foreign_words_are_told(toy, tmp_path, bert_folder, tokenizer):
    (tmp_path / "short.txt").write_text("the cat\n\na dog")
    with pytest.raises(DataError, match="fewer than one block of 32"):
        pretrain("bert", tmp_path / "short.txt", tmp_path / "a", overrides=SIZES, config=CONFIG, quiet=True)
    train_tokenizer(documents(toy), "WordPiece", 90).save_pretrained(tmp_path / "words")
    config = CONFIG.model_copy(update={"vocabulary": 0})
    with pytest.raises(ModelError, match="tokens, the model only 27"):
        pretrain(bert_folder, toy, tmp_path / "b", tokenizer=tmp_path / "words", config=config, quiet=True)
    with pytest.raises(ModelError, match="need 2 sentinels, the tokenizer has 0"):
        span_corruption.check(words_of(tokenizer, find_start("t5").config), 32, Guessing())
    assert len(draws(0, [1, 2])) == 2


def test_a_model_that_takes_fewer_positions_than_it_says_is_found_out(toy, tmp_path):
    sizes = {**SIZES, "max_position_embeddings": 32}  # RoBERTa counts positions from the padding token on
    with pytest.raises(OptionError, match="does not take blocks of 32 tokens"):
        pretrain("roberta", toy, tmp_path / "out", overrides=sizes, config=CONFIG, quiet=True)
