"""What a user can get wrong, through the verbs: one clear line, exit code 2, and not one file lost or left behind."""

import copy
import csv
import json
import random
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from conftest import KINDS, WORDS, build
from layershare import cli, find_stacks, make_plan, share

LABELS = ("blue", "red")
SMALL = ["--steps", "4", "--set", "batch_size=4", "--set", "max_length=16"]


def everything_in(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def classifier(folder, tokenizer, labels=LABELS, kind="Bert", **sizes):
    config = copy.deepcopy(build("bert", **sizes).config)
    if kind == "DistilBert":
        config = transformers.DistilBertConfig(
            vocab_size=config.vocab_size, dim=16, n_layers=4, n_heads=2, hidden_dim=32
        )
    config.id2label, config.label2id = dict(enumerate(labels)), {name: i for i, name in enumerate(labels)}
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForSequenceClassification")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def table(file, rows, columns=("text", "label")):
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([columns, *rows])


@pytest.fixture(scope="module")
def home(tmp_path_factory, tokenizer, bert_folder):
    """A folder of models and data, as a user may have it."""
    home, draw = tmp_path_factory.mktemp("home"), random.Random(0)
    classifier(home / "model", tokenizer)
    classifier(home / "other-labels", tokenizer, ("good", "bad"))
    classifier(home / "three-labels", tokenizer, ("blue", "green", "red"))
    classifier(home / "more-words", tokenizer, vocab_size=40)
    classifier(home / "no-cache", tokenizer, kind="DistilBert")
    swapped = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = swapped["model"]["vocab"]
    ids["cat"], ids["dog"] = ids["dog"], ids["cat"]
    other = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(swapped)),
        **tokenizer.special_tokens_map,
    )
    classifier(home / "other-words", other)
    shutil.copytree(bert_folder, home / "encoder")
    other.save_pretrained(home / "words")
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(transformers.T5Config(**KINDS["t5"][2])).save_pretrained(
        home / "t5"
    )
    tokenizer.save_pretrained(home / "t5")

    moods = [(" ".join([mood, *draw.sample(WORDS.split(), 6)]), mood) for mood in LABELS * 30]
    table(home / "data.csv", moods)
    table(home / "header.csv", [])
    table(home / "unlabelled.csv", [(text,) for text, _ in moods], ("text",))
    table(home / "blank.csv", [(text, "") for text, _ in moods])
    (home / "empty.csv").write_text("")
    (home / "text.txt").write_text("\n\n".join(" ".join(draw.sample(WORDS.split(), 12)) for _ in range(80)))
    make_plan(find_stacks(build("bert", num_hidden_layers=6)), "adjacent", unique=2).save(home / "plan.toml")
    (home / "mine.part").mkdir()
    (home / "mine.part" / "thesis.txt").write_text("mine")
    (home / "cut.part" / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    (home / "cut.part" / ".layershare").touch()
    classifier(home / "holes", tokenizer, kind="DistilBert")
    weights = load_file(home / "holes" / "model.safetensors")
    weights = {name: value for name, value in weights.items() if ".layer.2." not in name}
    save_file(weights, home / "holes" / "model.safetensors", metadata={"format": "pt"})
    build("bert").save_pretrained(home / "wordless")
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(home / "model")
    share(whole, make_plan(whole, "all")).save_pretrained(home / "shared")
    tokenizer.save_pretrained(home / "shared")
    run = ["adapt", "model", "--task", "text-classification", "--data", "data.csv", "-o", "adapter", *SMALL]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert cli.main(run) == 0
    return home


@pytest.fixture
def refused(home, capfd, monkeypatch):
    """Run a verb at home: exit code 2, one line of error, everything as it was. Returns the line."""

    def call(words):
        monkeypatch.chdir(home)
        before = everything_in(home)
        code = cli.main(words.split() if isinstance(words, str) else [str(word) for word in words])
        out, err = capfd.readouterr()
        told = [line for line in err.splitlines() if line.startswith("layershare: error: ")]
        assert (code, out, len(told)) == (2, "", 1), err
        assert everything_in(home) == before
        return told[0]

    return call


ON_DATA = "--task text-classification --data data.csv -o out"
WRONG = [
    # teacher and student with other words or labels
    (f"distill model --teacher more-words {ON_DATA}", "vocabularies differ.*27 tokens.*40"),
    (f"distill model --teacher other-words {ON_DATA}", "vocabularies differ in 2 tokens"),
    (f"distill model --teacher other-labels {ON_DATA}", "label"),
    (f"distill model --teacher three-labels {ON_DATA}", "label"),
    (f"adapt model --teacher more-words {ON_DATA}", "vocabularies differ"),
    (f"adapt model --teacher other-words {ON_DATA}", "vocabularies differ in 2 tokens"),
    (f"adapt model --teacher three-labels {ON_DATA}", "label"),
    (f"finetune other-labels {ON_DATA}", "--new-head"),
    (f"evaluate model other-labels {ON_DATA}".replace("-o out", ""), "label"),
    (f"compress other-labels {ON_DATA}", "label"),
    ("share model --plan plan.toml --budget 0.2 -o out", "--budget 0.2 and a plan file"),
    ("share model --plan plan.toml --merge last -o out", "--merge last and a plan file"),
    # what would be lost
    ("plan model --unique 2 -o model/config.json", "model/config.json is a file of the model"),
    ("encode word --model model -o model/model.safetensors", "model.safetensors is a file of the model"),
    ("share model --unique 2 -o mine", "mine.part exists and was not made by layershare"),
    (
        f"compress model --budget 0.5 {ON_DATA}".replace("-o out", "-o mine"),
        "mine.part exists and is not of a run",
    ),
    ("share model --unique 2 -o cut", "cut.part holds an interrupted run"),
    (
        f"compress model --budget 0.5 --overwrite {ON_DATA}".replace("-o out", "-o mine"),
        "mine.part exists and is not of a run",
    ),
    # models that have been here before
    (f"compress shared --budget 0.5 {ON_DATA}", "shared is shared already. Give the original"),
    (f"plan shared --budget 0.5 {ON_DATA}", "shared is shared already. Give the original"),
    # models without something
    (f"compress encoder --budget 0.5 {ON_DATA}", "BertModel, which gives no answer of a BertForSequence"),
    ("share holes --unique 2 -o out", r"holes lacks distilbert.transformer.layer.2.* and \d+ more weights"),
    (f"distill model --teacher holes {ON_DATA}", "holes lacks"),
    ("encode word --model wordless", "wordless has no tokenizer"),
    (f"finetune wordless {ON_DATA}", "wordless has no tokenizer"),
    # settings out of range or misspelt
    (f"distill model --teacher model {ON_DATA} --set temperature=0", "temperature"),
    (f"distill model --teacher model {ON_DATA} --set temperature=-1", "temperature"),
    (f"distill model --teacher model {ON_DATA} --set temperature=1e9", "temperature"),
    (f"distill model --teacher model {ON_DATA} --set lambda_mse=-1", "lambda_mse"),
    (f"distill model --teacher model {ON_DATA} --set lambda_mse=NaN", "lambda_mse"),
    (f"distill model --teacher model {ON_DATA} --set weights.hidden=-1", "weights.hidden"),
    (f"distill model --teacher model {ON_DATA} --set weights.hiden=1", "'hidden'"),
    (f"distill model --teacher model {ON_DATA} --set temprature=2", "'temperature'"),
    (f"distill model --teacher model {ON_DATA} --set temperature", "KEY=VALUE"),
    (f"distill model --teacher model {ON_DATA} --set layer_map=[[0,9]]", "layer map.*9"),
    (f"distill model --teacher model {ON_DATA} --steps 0", "steps"),
    (f"finetune model {ON_DATA} --steps 0", "steps"),
    ("pretrain model --data text.txt -o out --steps 0", "steps"),
    (
        f"distill model --teacher model {ON_DATA} --set weights.hidden=0 --set weights.logits=0",
        "No loss is left",
    ),
    (f"adapt model {ON_DATA} --set learning_rate=-1", "learning_rate"),
    (f"adapt model {ON_DATA} --set adapter.ranc=4", "'rank'"),
    (f"adapt model {ON_DATA} --set adapter.size=4", "size.*'lora'"),
    (f"finetune model {ON_DATA} --set pateince=3", "'patience'"),
    ("pretrain bert --data text.txt -o out --set rate=1.5", "rate"),
    # pruning everything, or nothing
    ("prune model --what positions --amount 4 -o out", "position"),
    ("prune model --what neurons --amount 32 -o out", "neuron"),
    ("prune model --what weights --amount 0 -o out", "amount"),
    ("prune model --what weights --amount 1.0 -o out --set scope=row", "row"),
    ("prune model --what positions --amount 2 -o out --set protect=[0,1,2,3]", "At most 0 can go"),
    ("prune model --what heads --amount 0.5 -o out", "keep_shape"),
    ("prune model --what weights --amount 0.5 -o out --set scop=row", "'scope'"),
    # adapters
    (f"adapt no-cache {ON_DATA} --method prefix", "no key-value cache.*houlsby"),
    (f"adapt model {ON_DATA} --per-group", "no sharing plan"),
    (f"adapt adapter {ON_DATA}", "config.json"),
    # no data, or no labels
    *(
        (f"{verb} --task text-classification --data {file}.csv{out}", f"{file}.csv")
        for verb, out in (
            ("finetune model", " -o out"),
            ("distill model --teacher model", " -o out"),
            ("adapt model", " -o out"),
            ("evaluate model", ""),
            ("prune model --what neurons --amount 0.5 --by taylor", " -o out"),
            ("compress model", " -o out"),
        )
        for file in ("empty", "header", "unlabelled", "blank")
    ),
    ("pretrain bert --data empty.csv -o out", "empty.csv"),
    ("adapt encoder --task sentence-embedding --data unlabelled.csv -o out", "no labels.*teacher"),
    ("share model --unique 2 -o out --calibration empty.csv --task text-classification", "empty.csv"),
    # what pretraining begins with
    ("pretrain bert --data text.txt -o out --tokenizer nowhere/there", "nowhere/there"),
    ("pretrain bert --data text.txt -o out --tokenizer plan.toml", "plan.toml"),
    ("pretrain model --data text.txt -o out --plan plan.toml", "6"),
    ("pretrain encoder --data text.txt -o out --unique 9 --block-size 16", "9"),
    ("pretrain encoder --data text.txt -o out --block-size 16 --tokenizer data.csv", "data.csv"),
    ("pretrain encoder --data text.txt -o out --block-size 9999", "9999"),
    # in the way
    (f"distill model --teacher model {ON_DATA[:-3]}model", "not an empty folder"),
    (f"adapt model {ON_DATA[:-3]}adapter", "not an empty folder"),
    ("prune model --what positions --amount 1 -o encoder", "not an empty folder"),
]


@pytest.mark.parametrize(("words", "said"), WRONG, ids=[words[:60] for words, _ in WRONG])
def test_a_wrong_word_costs_nothing(refused, words, said):
    line = refused(words)
    assert re.search(said, line), line


def test_an_adapter_of_another_base_is_not_measured(refused, home, tmp_path, tokenizer):
    file = home / "adapter" / "adapter_config.json"
    right = file.read_text()
    classifier(tmp_path / "deep", tokenizer, num_hidden_layers=2)
    try:
        for base, said in (("deep", "another base"), ("gone", "gone")):
            moved = json.loads(right) | {"base_model_name_or_path": str(tmp_path / base)}
            file.write_text(json.dumps(moved))
            assert said in refused("evaluate model adapter --task text-classification --data data.csv")
    finally:
        file.write_text(right)


TOO_FAST = {"learning_rate": 1e30, "save_every": 1, "max_grad_norm": 1e30, "warmup_ratio": 0}


def settings(values):
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


@pytest.mark.parametrize(
    "words",
    [
        f"finetune model {ON_DATA}",
        f"distill model --teacher model {ON_DATA}",
        f"adapt model {ON_DATA}",
        "pretrain albert --tokenizer encoder --block-size 16 --data text.txt -o out --size hidden_size=64",
    ],
    ids=lambda words: words.split()[0],
)
def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint_and_says_what_to_change(
    home, tmp_path, capfd, monkeypatch, words
):
    monkeypatch.chdir(home)
    out, part = tmp_path / "out", tmp_path / "out.part"
    words = words.replace("-o out", f"-o {out} --steps 6 --set batch_size=4").split()
    assert cli.main([*words, *settings(TOO_FAST)]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "Lower learning_rate (now 1e+30)" in line
    kept = sorted(part.rglob("checkpoint-*"))
    assert kept
    assert "the last good checkpoint is kept in" in line
    for file in (file for checkpoint in kept for file in checkpoint.glob("*.safetensors")):
        assert all(bool(value.isfinite().all()) for value in load_file(file).values())

    slower = [*words, *settings(TOO_FAST | {"learning_rate": 1e-4})]
    before = everything_in(part).keys()
    assert cli.main(slower) == 2  # another rate is another run, which is said before anything goes
    assert "--anew" in capfd.readouterr().err
    assert everything_in(part).keys() == before
    assert cli.main([*slower, "--anew"]) == 0
    assert (out / "result.json").is_file()
    assert not part.exists()
