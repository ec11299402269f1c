"""Exits: what is behind the last layer is found, rows leave one by one, full depth is the model's own to the bit."""

import json
import random

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from layershare import make_plan, plan_of, share
from layershare.cli import main
from layershare.errors import DataError, ModelError, OptionError, StoreError
from layershare.exits import EarlyExit, ExitsConfig, load
from layershare.exits.curve import NEVER, Answers, choose
from layershare.exits.fit import answers, fit, read
from layershare.exits.folder import add_exits
from layershare.exits.head import new_heads
from layershare.exits.tail import find_tail
from layershare.result import Result
from layershare.tasks import get_task

SIZES = dict(
    hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, pad_token_id=0, num_labels=3,
    vocab_size=60, bos_token_id=2, eos_token_id=3,
)  # fmt: skip
MODERN = SIZES | dict(cls_token_id=2, sep_token_id=3, classifier_pooling="mean")
GPT2 = dict(
    n_embd=16,
    n_layer=4,
    n_head=2,
    n_positions=64,
    vocab_size=60,
    num_labels=3,
    bos_token_id=2,
    eos_token_id=3,
)
DISTIL = dict(dim=16, n_layers=4, n_heads=2, hidden_dim=32, vocab_size=60, num_labels=3)
# name -> (family, config, pooling, kinds of what is behind it)
MODELS = {
    "bert": ("Bert", SIZES, "first", ["BertPooler", "Dropout", "Linear"]),
    "roberta": ("Roberta", SIZES | dict(max_position_embeddings=66), "first", ["RobertaClassificationHead"]),
    "distilbert": ("DistilBert", DISTIL, "first", ["Linear", "ReLU", "Dropout", "Linear"]),
    "modernbert": ("ModernBert", MODERN, "mean", ["ModernBertPredictionHead", "Dropout", "Linear"]),
    "deberta": ("DebertaV2", SIZES, "first", ["ContextPooler", "Dropout", "Linear"]),
    "gpt2": ("GPT2", GPT2 | dict(pad_token_id=0), "last", ["LayerNorm", "Linear"]),
    "llama": ("Llama", SIZES | dict(num_key_value_heads=1), "last", ["LlamaRMSNorm", "Linear"]),
}  # fmt: skip


def classifier(name, **more):
    family, sizes, *_ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes | more)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    with torch.no_grad():  # as drawn, all texts are much alike to it
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    return model.eval()


def padded(rows=6, tokens=6):
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 60, (rows, tokens), generator=draw)
    mask = torch.ones_like(ids)
    for row in range(rows):
        ids[row, tokens - row % 4 :], mask[row, tokens - row % 4 :] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def drawn_heads(model, tail, positions=(0, 1, 2)):
    heads = new_heads(model, tail, {p: (tail.pooling, "mean")[p % 2] for p in positions})
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.7 * torch.randn(parameter.shape, generator=draw))
    return heads.eval()


def depth_by_depth(model, tail, heads, batch):
    """The logits of every exit and of the end, from the hidden states that the model itself gives out."""
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
        said = [
            head(tail.pooled(out.hidden_states[int(p) + 1], batch["attention_mask"], head.pooling))
            for p, head in heads.items()
        ]
    return torch.stack([*said, out.logits])


@pytest.mark.parametrize("name", MODELS)
def test_the_tail_is_found_by_watching(name):
    tail = find_tail(classifier(name))
    assert (tail.pooling, [type(module).__name__ for module, _ in tail.behind]) == MODELS[name][2:]


@pytest.mark.parametrize("name", MODELS)
def test_rows_leave_where_they_are_sure_and_the_others_go_on_alone(name):
    model, batch = classifier(name), padded()
    tail = find_tail(model)
    heads = drawn_heads(model, tail)
    said = depth_by_depth(model, tail, heads, batch)
    sure = said.softmax(-1).amax(-1)
    threshold = sure[:3].flatten().sort().values[8:10].mean().item()  # no text is just as sure
    early = EarlyExit(model, heads, threshold, tail)
    out = early(**batch)
    left = [next((p for p in range(3) if sure[p, row] >= threshold), 3) for row in range(6)]
    assert out.positions.tolist() == left
    assert len(set(left)) > 1
    expected = torch.stack([said[p, row] for row, p in enumerate(left)])
    torch.testing.assert_close(out.logits, expected, rtol=1e-4, atol=1e-5)
    for row in range(6):  # each alone, without its padding
        count = int(batch["attention_mask"][row].sum())
        one = early(**{key: value[row : row + 1, :count] for key, value in batch.items()})
        assert one.positions.item() == left[row]
        torch.testing.assert_close(one.logits[0], expected[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_full_depth_is_the_model_itself_to_the_bit(name):
    model, batch = classifier(name), padded()
    with torch.no_grad():
        before = model(**batch).logits
    early = EarlyExit(model, drawn_heads(model, find_tail(model)), NEVER)
    out = early(**batch)
    assert torch.equal(out.logits, before)
    assert out.positions.tolist() == [3] * 6
    early.threshold = 0.01
    assert early(**batch).positions.tolist() == [0] * 6
    with torch.no_grad():  # the model knows nothing of its exits
        assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("preset", ["cycle", "gated", "basis"])
def test_shared_models_get_exits_too(preset):
    model = classifier("bert")
    student = share(
        model, make_plan(model, preset, **({"budget": 0.5} if preset == "basis" else {"unique": 2}))
    )
    tail = find_tail(student)
    heads, batch = drawn_heads(student, tail), padded()
    said = depth_by_depth(student, tail, heads, batch)
    out = EarlyExit(student, heads, {0: NEVER, 1: 0.0, 2: 0.0}, tail)(**batch)
    torch.testing.assert_close(out.logits, said[1])


def test_where_the_head_is_not_found_a_linear_map_reads_the_same_token():
    model = classifier("bert")
    forward = model.bert.pooler.forward
    model.bert.pooler.forward = lambda states: forward(states).flip(-1)
    tail = find_tail(model)  # what a module computes is its own matter
    assert tail.behind
    inner = model.forward

    def twisted(*args, **kwargs):
        out = inner(*args, **kwargs)
        out.logits = out.logits.flip(-1).sinh()
        return out

    model.forward = twisted
    tail = find_tail(model)
    assert (tail.pooling, tail.before, tail.behind) == ("first", (), ())
    assert [tuple(p.shape) for p in new_heads(model, tail, {0: "first"}).parameters()] == [(3, 16), (3,)]


def test_heads_learn_what_the_end_says_and_the_model_learns_nothing(tokenizer):
    model = classifier("bert", vocab_size=30)
    tail = find_tail(model)
    draw = random.Random(0)
    rows = {"input_ids": [[2, *draw.choices(range(5, 30), k=draw.randint(3, 9)), 3] for _ in range(300)]}
    rows["attention_mask"] = [[1] * len(row) for row in rows["input_ids"]]
    model.classifier.bias.data -= read(model, tail, (0,), tokenizer, rows).logits.mean(
        0
    )  # all classes are said
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = read(model, tail, (0, 2), tokenizer, rows)
    one = {
        "input_ids": torch.tensor(rows["input_ids"][7:8]),
        "attention_mask": torch.tensor(rows["attention_mask"][7:8]),
    }
    heads = new_heads(model, tail, {0: "first", 2: "mean"})
    torch.testing.assert_close(
        answers(heads, seen)[:, 7:8], depth_by_depth(model, tail, heads, one), rtol=1e-4, atol=1e-5
    )
    end = answers(heads, seen)[-1].argmax(-1)
    agreed = (answers(heads, seen).argmax(-1) == end).float().mean(1)
    other = new_heads(model, tail, {0: "mean", 2: "first"})
    heads, history = fit(
        [heads, other], seen, seen, ExitsConfig(epochs=40, batch_size=32, learning_rate=5e-3)
    )
    after = (answers(heads, seen).argmax(-1) == end).float().mean(1)
    assert (after[:-1] > agreed[:-1] + 0.1).all()
    assert history[-1]["validation_loss"] < history[0]["validation_loss"] / 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_chosen_threshold_is_the_least_that_keeps_the_score():
    draw = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 2, (200,), generator=draw)
    signal = torch.nn.functional.one_hot(truth, 2).float()
    logits = torch.stack([signal * s + torch.randn(200, 2, generator=draw) for s in (0.5, 1.5, 3.0)])
    held = Answers(logits, (0, 1, 2))

    def score(said):
        return (torch.tensor(said) == truth).float().mean().item()

    def by_hand(threshold):
        sure = logits[:2].softmax(-1).amax(-1) >= threshold
        rows = [next((logits[e, i] for e in (0, 1) if sure[e, i]), logits[2, i]) for i in range(200)]
        return score([row.argmax().item() for row in rows])

    chosen, bar = choose(held, score, 0.02), 0.98 * by_hand(NEVER)
    assert 0.5 < chosen < 1
    assert by_hand(chosen) >= bar
    below = [one for one in held.thresholds(512) if one < chosen]
    assert below
    assert all(by_hand(one) < bar for one in below)
    assert choose(held, lambda said: float(said == held.said(NEVER)), 0.0) > chosen
    assert choose(held, lambda said: -score(said) if said != held.said(NEVER) else 2.0, 0.0) > chosen


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer):
    """A shared classifier, the texts that it is right about (its own answers), and its folder with exits."""
    root = tmp_path_factory.mktemp("exits")
    model = classifier("bert", vocab_size=len(tokenizer), num_labels=2)
    model = share(model, make_plan(model, "adjacent", unique=2))
    words = [word for word in tokenizer.get_vocab() if not word.startswith("[")]
    draw = random.Random(0)
    texts = list(dict.fromkeys(" ".join(draw.choices(words, k=draw.randint(3, 9))) for _ in range(400)))
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
        leaning = logits.diff(dim=1).flatten()
        near = leaning.sort().values[len(texts) * 2 // 5 : len(texts) * 3 // 5]
        gap = near.diff().argmax()
        middle = near[gap : gap + 2].mean()  # about half of the texts are of either class, none in doubt
        model.classifier.bias[0] += middle
        said = (leaning > middle).int().tolist()
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    rows = [f"{text},LABEL_{label}" for text, label in zip(texts, said, strict=True)]
    (root / "data.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    config = ExitsConfig(epochs=20, learning_rate=5e-3, max_loss=0.1, timed=4)
    result = add_exits(root / "model", root / "data.csv", root / "out", config=config)
    return root, result


def test_the_folder_is_the_model_and_also_the_model_with_exits(made, tokenizer):
    root, result = made
    before, after = (load_file(root / name / "model.safetensors") for name in ("model", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    plain = AutoModelForSequenceClassification.from_pretrained(root / "out")
    assert plan_of(plain) is not None
    early = load(root / "out")
    batch = tokenizer(["the cat sits", "a dog runs in the big park"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(load(root / "out", threshold=NEVER)(**batch).logits, plain(**batch).logits)
    # what result.json says of the test split, judged anew through the model that runs
    task = get_task("text-classification")
    test = task.read([root / "data.csv"], seed=0).test
    for model, figures in ((plain, result.models[0]), (early, result.models[1])):
        assert task.evaluate(model, tokenizer, test)["accuracy"] == pytest.approx(figures.metrics["accuracy"])
    assert result.models[0].metrics["accuracy"] == 1.0


def test_the_curve_goes_from_the_first_exit_to_full_depth(made):
    root, result = made
    assert Result.load(root / "out").curve == result.curve
    first, *_, never = result.curve
    assert never["threshold"] == NEVER
    assert never["layers"] == 4
    assert never["quality"] == 1.0
    assert first["layers"] < 2
    assert first["times_as_fast"] > never["times_as_fast"]
    assert [one["layers"] for one in result.curve] == sorted(one["layers"] for one in result.curve)
    (chosen,) = (one for one in result.curve if one["chosen"])
    assert chosen["threshold"] == load(root / "out").threshold
    assert chosen["quality"] == result.models[1].metrics["accuracy"]
    picture = (root / "out" / "exits.svg").read_text(encoding="utf-8")
    assert picture.startswith("<svg")
    assert picture.count("<circle") == len(result.curve) + 2


def test_the_report_draws_the_curve(made):
    from layershare.report import html

    assert "Quality against speed" in html(made[1])
    assert "Quality against speed" not in html(made[1].model_copy(update={"curve": []}))


def test_the_verb(made, capsys, tmp_path):
    root, _ = made
    out = tmp_path / "out"
    arguments = [
        "exits",
        str(root / "model"),
        "--data",
        str(root / "data.csv"),
        "-o",
        str(out),
        "--max-loss",
        "0.2",
    ]
    assert (
        main([*arguments, "--set", "positions=[1]", "--set", "epochs=2", "--set", "timed=2", "--json"]) == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert load(out).positions == (1,)
    assert told["curve"]
    assert told["task"] == "text-classification"
    assert main(arguments) == 2
    assert "is not an empty folder" in capsys.readouterr().err


def test_what_is_wrong_is_said_and_nothing_is_written(made, tmp_path, tiny, tokenizer):
    root, _ = made
    data, out = root / "data.csv", tmp_path / "out"

    def refused(error, match, model=root / "model", data=data, **options):
        with pytest.raises(error, match=match):
            add_exits(model, data, out, **options)
        assert not list(tmp_path.glob("out*"))

    refused(OptionError, "no exit behind position 3", config=ExitsConfig(positions=(0, 3)))
    refused(OptionError, "positions names no exit", config=ExitsConfig(positions=()))
    refused(OptionError, "not for sentence-embedding", task="sentence-embedding")
    numbers = tmp_path / "numbers.csv"
    numbers.write_text("text,score\n" + "".join(f"cat {i},{i}.5\n" for i in range(40)), encoding="utf-8")
    regressor = tmp_path / "regressor"
    classifier("bert", vocab_size=len(tokenizer), num_labels=1).save_pretrained(regressor)
    tokenizer.save_pretrained(regressor)
    refused(ModelError, "one label a text", regressor, numbers, columns={"score": "score"})
    with pytest.raises(StoreError, match="has no exits"):
        load(root / "model")
    with pytest.raises(OptionError, match="threshold is 0"):
        load(root / "out", threshold=0)
    t5 = transformers.T5ForSequenceClassification(
        transformers.T5Config(d_model=16, num_layers=2, vocab_size=60, pad_token_id=0)
    )
    with pytest.raises(ModelError, match="encoder-decoder"):
        find_tail(t5)
    xlnet = transformers.XLNetConfig(d_model=16, n_layer=2, n_head=2, d_inner=32, vocab_size=60)
    with pytest.raises(ModelError, match="do not give states"):
        find_tail(transformers.XLNetForSequenceClassification(xlnet))


def test_exits_of_another_model_are_refused(made, tmp_path, tokenizer):
    import shutil

    root, _ = made
    shutil.copytree(root / "out", tmp_path / "other")
    classifier("bert", vocab_size=len(tokenizer), num_labels=5).save_pretrained(tmp_path / "other")
    with pytest.raises(StoreError, match="do not fit the model"):
        load(tmp_path / "other")
    (tmp_path / "other" / "exits.json").write_text("{", encoding="utf-8")
    with pytest.raises(StoreError, match="is broken"):
        load(tmp_path / "other")


def test_data_without_labels_is_refused(made, tmp_path):
    file = tmp_path / "plain.csv"
    file.write_text("text\n" + "".join(f"cat {i}\n" for i in range(40)), encoding="utf-8")
    with pytest.raises(DataError):
        add_exits(made[0] / "model", file, tmp_path / "out")


@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt2"])
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_an_onnx_graph_leaves_at_the_same_exits_and_stores_every_weight_once(name, int8, tmp_path):
    onnx = pytest.importorskip("onnxruntime") and __import__("layershare.onnx", fromlist=["load"])
    from layershare.exits.store import save
    from layershare.export import export

    model = classifier(name)
    if name != "modernbert":
        model = share(model, make_plan(model, "cycle", unique=2))
    tail = find_tail(model)
    heads, batch = drawn_heads(model, tail), padded()
    sure = depth_by_depth(model, tail, heads, batch)[:3].softmax(-1).amax(-1)
    model.save_pretrained(tmp_path / "model")
    save(tmp_path / "model", heads, sure.flatten().sort().values[8:10].mean().item(), {})
    made = export(tmp_path / "model", tmp_path / "onnx", "onnx", int8=int8)
    assert made.shared > 0 or name == "modernbert"
    assert not int8 or made.quantized == made.products
    early, runner = load(tmp_path / "model"), onnx.load(tmp_path / "onnx")
    left = []
    for row in range(6):
        count = int(batch["attention_mask"][row].sum())
        one = {key: value[row : row + 1, :count] for key, value in batch.items()}
        arrays = {key: value.numpy() for key, value in one.items()}
        arrays["token_type_ids"] = 0 * arrays["input_ids"]
        wanted, found = early(**one), runner(**arrays)
        left.append(int(found["exit"]))
        if not int8:
            assert left[-1] == (-1 if wanted.positions.item() == 3 else wanted.positions.item())
        torch.testing.assert_close(
            torch.from_numpy(found["logits"]), wanted.logits, rtol=0, atol=0.3 if int8 else 1e-4
        )
        runner.threshold = NEVER
        assert runner(**arrays)["exit"] == -1
        runner.threshold = None
    assert len(set(left)) > 1
