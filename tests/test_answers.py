"""Several labels, numbers, and tags of words: read, learnt, distilled and judged."""

import json
from typing import Any

import pytest
import torch
from sklearn.metrics import f1_score, matthews_corrcoef
from torch.nn import functional

from layershare.errors import DataError, ModelError
from layershare.finetune import FinetuneConfig, finetune
from layershare.heal.config import DistillConfig
from layershare.heal.distill import distill, loss_terms
from layershare.heal.losses import label_ce
from layershare.heal.questions import questions
from layershare.heal.teacher import Target
from layershare.prune.config import PruneConfig
from layershare.prune.folder import prune_folder
from layershare.tasks import get_task
from layershare.tasks.scores import METRICS
from layershare.tasks.task import Outputs
from layershare.tasks.token_classification import entities, entity_scores, pieces

TEXTS: Any = get_task("text-classification")
TAGS: Any = get_task("token-classification")
SMALL = FinetuneConfig(
    steps=60, batch_size=16, learning_rate=1e-2, judge_every=30, max_length=16, dropout=False
)
QUICK = DistillConfig(steps=4, batch_size=8, max_length=16)
ANIMALS, PLACES = ("cat", "dog", "bird"), ("park", "house")


def sentences(count=90):
    import random

    draw = random.Random(0)
    words = [*ANIMALS, *PLACES, "the", "a", "red", "big", "sits"]
    return [" ".join(row) for row in dict.fromkeys(tuple(draw.choices(words, k=4)) for _ in range(count))]


@pytest.fixture
def write(tmp_path):
    def write(rows, name="x.jsonl"):
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file

    return write


@pytest.fixture
def several(write):
    """An animal, a place, both or neither."""
    kinds = {"animal": ANIMALS, "place": PLACES}
    return write(
        {"text": t, "kinds": [k for k, words in kinds.items() if set(words) & set(t.split())]}
        for t in sentences()
    )


@pytest.fixture
def numbers(write):
    """How many animals."""
    return write({"text": t, "count": sum(w in ANIMALS for w in t.split()) / 2} for t in sentences())


@pytest.fixture
def tagged(write):
    return write(
        {
            "tokens": t.split(),
            "ner_tags": ["B-ANI" if w in ANIMALS else "B-PLA" if w in PLACES else "O" for w in t.split()],
        }
        for t in sentences()
    )


# ---- several labels


def test_a_model_that_does_not_say_it_gives_several_labels_is_refused(several, tiny):
    config = tiny("bert").config
    data = TEXTS.read(several, columns={"labels": "kinds"})
    config.label2id = {name: i for i, name in enumerate(data.labels)}
    with pytest.raises(DataError, match=r"several labels a text.*set problem_type .* 'multi_label_class"):
        TEXTS.check(data, config)
    config.problem_type = "multi_label_classification"
    TEXTS.check(data, config)


def test_several_labels_are_questions_side_by_side(several, bert_folder, tmp_path):
    columns = {"labels": "kinds"}
    result = finetune(bert_folder, several, tmp_path / "out", columns=columns, config=SMALL, quiet=True)
    assert result.metric == "macro_f1"
    assert result.models[1].metrics["macro_f1"] > 0.75
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.problem_type == "multi_label_classification"
    data = TEXTS.read(several, columns=columns)
    rows = TEXTS.encode(tokenizer, data.train, 16, model.config)
    batch = TEXTS.collate(tokenizer, [rows[i] for i in range(8)])
    inputs = {name: batch[name] for name in TEXTS.inputs if name in batch}
    with torch.no_grad():
        said, theirs = TEXTS.forward(model, inputs), model(**batch)
    assert said.logits.shape == (8, 2, 2)
    torch.testing.assert_close(TEXTS.loss(said, batch["labels"]), theirs.loss)
    # The divergence of two-way softmaxes is that of the sigmoids.
    p, q = theirs.logits.sigmoid(), (theirs.logits + 1).sigmoid()
    want = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean() / 2
    other = Outputs(None, torch.stack([torch.zeros_like(theirs.logits), theirs.logits + 1], -1), (), None)
    found = loss_terms(other, Target(None, said.logits), {"logits": 1.0}, lambda_mse=0.0)["logits"]
    torch.testing.assert_close(found, want)
    history = distill(model, model, tokenizer, TEXTS, data, QUICK, tmp_path / "run", quiet=True)
    assert history[0]["logits"] < 1e-6
    cut = PruneConfig.parse({"what": "neurons", "amount": 0.5, "by": "taylor"})
    prune_folder(tmp_path / "out", cut, tmp_path / "cut", task=TEXTS, data=[several], columns=columns)


def test_macro_f1_and_matthews_are_those_of_scikit_learn():
    true, said = [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], [[1, 0], [0, 1], [0, 1]]
    figures = METRICS["labels"](true, said)
    assert figures["macro_f1"] == pytest.approx(f1_score([[1, 0], [1, 1], [0, 0]], said, average="macro"))
    assert figures["accuracy"] == pytest.approx(1 / 3)
    assert METRICS["label"]([0, 1, 1, 0], [0, 1, 0, 0])["matthews"] == pytest.approx(
        matthews_corrcoef([0, 1, 1, 0], [0, 1, 0, 0])
    )


def test_labels_in_a_csv_stand_between_bars(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("text,kinds\na cat,b|a\na dog,a\nthe man,b; a\n")
    data: Any = TEXTS.read(file, columns={"labels": "kinds"}, split=(1, 0, 0))
    assert data.labels == ("a", "b")
    assert data.train["labels"][:] == [["a", "b"], ["a"], ["a", "b"]]
    other = tmp_path / "y.jsonl"
    other.write_text('{"text": "a", "label": ["x"]}\n')
    with pytest.raises(
        DataError, match=r"line 1, column 'label': expected one label, found a list.*labels=NAME"
    ):
        TEXTS.read(other)


def test_equal_texts_with_other_labels_are_asked_for_what_they_agree_on(tokenizer, write, tiny):
    file = write(
        [
            {"text": "a cat", "kinds": ["x", "y"]},
            {"text": "a cat", "kinds": ["x"]},
            {"text": "b", "kinds": []},
        ]
    )
    data = TEXTS.read(file, columns={"labels": "kinds"}, split=(1, 0, 0))
    config = tiny("bert").config
    config.label2id = {"x": 0, "y": 1}
    config.id2label = {0: "x", 1: "y"}
    labels = questions(TEXTS, tokenizer, data, config, QUICK)["labels"][:]
    assert labels[0][0] == 1
    assert labels[0][1] != labels[0][1]  # not a number
    assert labels[1] == [0, 0]


# ---- numbers


def test_numbers_are_learnt_and_judged_by_correlation(numbers, bert_folder, tmp_path):
    columns = {"score": "count"}
    result = finetune(bert_folder, numbers, tmp_path / "out", columns=columns, config=SMALL, quiet=True)
    assert result.metric == "spearman"
    assert result.models[1].metrics["pearson"] > 0.8
    with pytest.raises(DataError, match=r"read as label .*the model is for regression"):
        finetune(tmp_path / "out", labelled(tmp_path), tmp_path / "other", config=SMALL, quiet=True)
    with pytest.raises(DataError, match=r"0\.5 is not a label.*--column score=NAME"):
        TEXTS.read(numbers, columns={"label": "count"})


def labelled(tmp_path):
    file = tmp_path / "labelled.csv"
    file.write_text(
        "text,label\n" + "".join(f"{t},{'no' if i % 2 else 'yes'}\n" for i, t in enumerate(sentences()))
    )
    return file


def test_the_loss_goes_by_the_kind_of_label():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1, generator=draw)
    torch.testing.assert_close(
        label_ce(logits, torch.tensor([1.0, float("nan"), -100.0])),
        functional.mse_loss(logits[[0, 2], 0], torch.tensor([1.0, -100.0])),
    )
    several, true = torch.randn(4, 3, generator=draw), torch.randint(2, (4, 3), generator=draw).float()
    pairs = torch.stack([torch.zeros_like(several), several], -1)
    torch.testing.assert_close(
        label_ce(pairs, true), functional.binary_cross_entropy_with_logits(several, true)
    )
    assert label_ce(pairs, torch.full((4, 3), float("nan"))) == 0


# ---- tags


def test_entities_as_seqeval_publishes_them():
    """The examples of seqeval's README (1.2.2)."""
    true = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    said = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    assert entity_scores(true, said) == {"f1": 0.5, "precision": 0.5, "recall": 0.5}
    assert entity_scores([["B-NP", "I-NP", "O"]], [["I-NP", "I-NP", "O"]])["f1"] == 1.0
    assert entity_scores([["O"]], [["O"]]) == {"f1": 0.0, "precision": 0.0, "recall": 0.0}


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-PER I-PER O B-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),
        ("B-PER B-PER", [("PER", 0, 0), ("PER", 1, 1)]),
        ("I-PER I-LOC I-LOC", [("PER", 0, 0), ("LOC", 1, 2)]),
        ("B-PER E-PER S-PER I-LOC", [("PER", 0, 1), ("PER", 2, 2), ("LOC", 3, 3)]),
        ("U-PER B-LOC L-LOC O", [("PER", 0, 0), ("LOC", 1, 2)]),
        ("E-PER E-PER", [("PER", 0, 0), ("PER", 1, 1)]),
        ("B-A-B I-A-B", [("A-B", 0, 1)]),
        ("PER PER O LOC", [("PER", 0, 1), ("LOC", 3, 3)]),
        ("O O", []),
    ],
)
def test_entities_in_every_notation(tags, expected):
    assert entities(tags.split()) == expected


def test_a_word_is_asked_for_at_its_first_piece():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    rows = [["guitar", "a", "sing"], ["a"]]
    parts = ["gui", "tar", "a", "sing", "Ġgui", "Ġa", "Ġ", "g", "u", "i", "t", "r", "s", "n"]
    raw = Tokenizer(models.BPE({p: i for i, p in enumerate(parts)} | {"[S]": 99}, [("Ġ", "a")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.post_processor = processors.TemplateProcessing(single="[S] $A [S]", special_tokens=[("[S]", 99)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[S]")
    columns, firsts = pieces(tokenizer, rows, 32)
    words = [tokenizer.convert_ids_to_tokens(ids) for ids in columns["input_ids"]]
    # [S] g u i t a r _a _ s i n g [S]: a space alone is no piece of a word, one in front of a piece is
    assert [words[0][place] for place in firsts[0].values()] == ["g", "Ġa", "s"]
    assert firsts[1] == {0: 1}
    cut = pieces(tokenizer, rows, 5)[1]
    assert list(cut[0]) == [0]


def test_tags_are_learnt_distilled_and_judged(tagged, bert_folder, tmp_path):
    result = finetune(
        bert_folder, tagged, tmp_path / "out", task="token-classification", config=SMALL, quiet=True
    )
    assert result.metric == "f1"
    assert result.models[1].metrics["f1"] > 0.9
    assert result.models[1].metrics["accuracy"] > 0.9
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    model: Any = AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert sorted(model.config.label2id) == ["B-ANI", "B-PLA", "O"]
    data = TAGS.read(tagged)
    rows = TAGS.encode(tokenizer, data.train, 16, model.config)
    first = rows[0]
    assert len(first["labels"]) == len(first["input_ids"])
    assert [model.config.id2label[i] for i in first["labels"] if i != -100] == data.train[0]["tags"]
    batch = TAGS.collate(tokenizer, [rows[i] for i in range(4)])
    inputs = {name: batch[name] for name in TAGS.inputs if name in batch}
    with torch.no_grad():
        torch.testing.assert_close(
            TAGS.loss(TAGS.forward(model, inputs), batch["labels"]), model(**batch).loss
        )
    history = distill(
        model, model, tokenizer, TAGS, data, QUICK, tmp_path / "run", quiet=True, cache=tmp_path / "c"
    )
    assert history[0]["logits"] < 1e-6
    assert (
        TAGS.evaluate(model, tokenizer, data.test, max_length=3)["recall"] < 1
    )  # words behind it count as O


def test_tags_that_are_not_as_many_as_the_words(write, tmp_path):
    file = write([{"tokens": ["a", "b"], "tags": ["O", "O"]}, {"tokens": ["a", "cat"], "tags": ["O"]}])
    with pytest.raises(DataError, match=r"line 2, column 'tags': 1 tags for 2 words"):
        TAGS.read(file, split=(1, 0, 0))
    csv = tmp_path / "x.csv"
    csv.write_text("text,tags\na cat sits,O B-A O\nthe dog,O B-A\n")
    data: Any = TAGS.read(csv, split=(1, 0, 0))
    assert data.train[0] == {"words": ["a", "cat", "sits"], "tags": ["O", "B-A", "O"]}
    assert TAGS.metric_of(data.train) == "f1"
    words = write([{"tokens": ["a", "cat"], "pos": ["DET", "NOUN"]}])
    assert TAGS.metric_of(TAGS.read(words, split=(1, 0, 0)).train) == "accuracy"


def test_a_tokenizer_that_does_not_tell_its_pieces_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="which piece belongs to which word"):
        pieces(Slow(), [["a"]], 8)
