"""Data from objects and the hub, and rows that cannot be read: left out, counted and told when that is asked for."""

import json
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from layershare.errors import DataError, OptionError
from layershare.finetune import finetune
from layershare.tasks import get_task
from layershare.tasks.sources import is_file_name

TEXTS: Any = get_task("text-classification")
LENIENT: Any = get_task("text-classification", skip_bad=True)
EVERY = (1, 0, 0)
ROWS = [{"text": f"a cat {i}", "label": ["no", "yes"][i % 2]} for i in range(40)]


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_an_object_is_read_as_a_file_with_these_rows(write):
    file = write("x.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    ours, theirs = TEXTS.read(Dataset.from_list(ROWS), seed=3), TEXTS.read(file, seed=3)
    for part in ("train", "validation", "test"):
        assert ours.splits[part].to_dict() == theirs.splits[part].to_dict()
    assert len(next(iter(ours.sha256.values()))) == 64
    other = TEXTS.read(Dataset.from_list(ROWS[::-1]), seed=3)
    assert list(other.sha256.values()) != list(ours.sha256.values())
    json.dumps(ours.describe())


def test_the_parts_of_a_data_set_are_ours(tmp_path):
    parts = DatasetDict(
        train=Dataset.from_list(ROWS[:30]),
        validation=Dataset.from_list(ROWS[28:34]),
        test=Dataset.from_list(ROWS[34:]),
        unsupervised=Dataset.from_list(ROWS[:3]),
    )
    data = TEXTS.read(parts)
    assert data.sizes == {"train": 28, "validation": 6, "test": 6}
    assert any("2 of 30 rows" in note for note in data.notes)
    own = TEXTS.read(parts, test=Dataset.from_list(ROWS[36:]))
    assert own.sizes["test"] == 4
    with pytest.raises(DataError, match="no split 'train', only all"):
        TEXTS.read(DatasetDict(all=Dataset.from_list(ROWS)))


def test_class_labels_and_structs_have_their_names():
    features = Features(
        tokens=List(Value("string")),
        ner_tags=List(ClassLabel(names=["O", "B-A"])),
        translation={"en": Value("string")},
    )
    rows = [{"tokens": ["a", "cat"], "ner_tags": [0, 1], "translation": {"en": "hello"}}]
    data: Any = get_task("token-classification").read(Dataset.from_list(rows, features=features), split=EVERY)
    assert data.train[0] == {"words": ["a", "cat"], "tags": ["O", "B-A"]}
    single = Dataset.from_dict(
        {"text": ["a", "b", "c"], "label": [1, 0, -1]},
        features=Features(text=Value("string"), label=ClassLabel(names=["neg", "pos"])),
    )
    assert LENIENT.read(single, split=EVERY).labels == ("neg", "pos")
    with pytest.raises(DataError, match="row 3, column 'label': is empty"):
        TEXTS.read(single, split=EVERY)
    texts: Any = get_task("causal-lm").read(
        Dataset.from_list(rows, features=features), columns={"text": "translation.en"}, split=EVERY
    )
    assert texts.train["text"][:] == ["hello"]


def test_an_object_goes_through_finetune(bert_folder, tmp_path):
    from layershare.finetune import FinetuneConfig

    result = finetune(
        bert_folder, Dataset.from_list(ROWS), tmp_path / "out", config=FinetuneConfig(steps=2, batch_size=4), quiet=True
    )  # fmt: skip
    assert list(result.data["sizes"].values()) == [32, 4, 4]


def test_a_hub_name_is_no_file(write, tmp_path):
    assert not is_file_name("nyu-mll/glue:sst2")
    assert not is_file_name("owner/name")
    assert is_file_name("folder/data.csv")
    assert is_file_name("/owner/name")
    assert is_file_name("name")
    assert is_file_name(write("x", ""))
    with pytest.raises(DataError, match="nowhere/at-all: no such file, and the hub did not give a data set"):
        TEXTS.read("nowhere/at-all")
    with pytest.raises(DataError, match="A int is no data"):
        TEXTS.read([3])


# ---- rows that cannot be read


BAD = {
    "x.csv": (
        b"text,label\na cat,yes\na dog\n,no\nthe man,no\ncaf\xe9,yes\n",
        ["line 3: 1 columns", "line 4, column 'text': is empty", "line 6, column 'text': holds bytes"],
    ),
    "x.tsv": (b"text\tlabel\na cat\tyes\na\tb\tc\nthe man\tno\n", ["line 3: 3 columns"]),
    "x.jsonl": (
        (
            b'{"text": "a cat", "label": "yes"}\n{"text": \n[1]\n{"text": {}, "label": "no"}\n'
            b'{"text": "the man", "label": "no"}\n{"text": "b", "label": 0.5}\n{"text": "c"}\n'
        ),
        ["line 2: not JSON", "line 3: a list", "line 4, column 'text'", "line 6, column 'label'", "line 7"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_left_out_counted_and_told(write, name):
    content, told = BAD[name]
    file = write(name, content)
    with pytest.raises(DataError):
        TEXTS.read(file, split=EVERY)
    data = LENIENT.read(file, split=EVERY)
    assert data.train.to_dict() == {"text": ["a cat", "the man"], "label": ["yes", "no"]}
    note = next(note for note in data.notes if "skipped" in note)
    assert f"{len(told)} of {len(told) + 2} rows were skipped" in note
    for problem in told:
        assert problem in note


def test_of_many_bad_rows_the_first_are_told(write):
    file = write("x.csv", "text,label\na,yes\nb,no\n" + ",no\n" * 9)
    note = LENIENT.read(file, split=EVERY).notes[-1]
    assert "9 of 11 rows were skipped" in note
    assert note.count("is empty") == 5
    assert "and 4 more" in note


def test_a_file_without_one_good_row_is_an_error(write):
    with pytest.raises(
        DataError, match=r"not one row can be read. The first: .*line 2, column 'text': is empty"
    ):
        LENIENT.read(write("x.csv", "text,label\n,yes\n,no\n"))
    with pytest.raises(DataError, match=r"a quote|unexpected end"):
        LENIENT.read(write("y.csv", 'text,label\n"a,yes\n'))


def test_nothing_is_skipped_unless_it_is_asked_for(write):
    good = write("x.csv", "text,label\na,yes\nb,no\n")
    assert LENIENT.read(good, split=EVERY).train.to_dict() == TEXTS.read(good, split=EVERY).train.to_dict()
    assert not any("skipped" in note for note in LENIENT.read(good, split=EVERY).notes)


def test_unequal_tags_and_running_text_can_be_skipped(write):
    tags: Any = get_task("token-classification", skip_bad=True)
    file = write("x.jsonl", '{"words": ["a"], "tags": ["O"]}\n{"words": ["a", "b"], "tags": ["O"]}\n')
    data = tags.read(file, split=EVERY)
    assert len(data.train) == 1
    assert "1 tags for 2 words" in data.notes[-1]
    language: Any = get_task("causal-lm", skip_bad=True)
    assert language.read(write("y.csv", "text\na\nb,c\nd\n"), split=EVERY).train["text"][:] == ["a", "d"]
    with pytest.raises(OptionError, match=r"z\.txt: skip_bad is for rows of a table"):
        language.read(write("z.txt", "a\n"), split=EVERY)
