"""The command line: answers on stdout, everything else on stderr, wrong input is one line and exit code 2."""

import functools
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import layershare
from layershare import cli
from layershare.cli import answer
from layershare.errors import OptionError
from layershare.measure import compare

VERBS = ["compress", "plan", "share", "distill", "evaluate", "verify", "report", "demo"]
VERBS += ["pretrain", "finetune", "adapt", "prune", "run", "architectures", "export", "bench", "encode"]


@pytest.fixture
def run(capsys):
    """``run("plan", folder, "--unique", 2)`` -> (exit code, stdout, stderr)."""

    def call(*words):
        code = cli.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refused(run):
    """Run, demand exit code 2, nothing on stdout and exactly one line on stderr; return that line."""

    def call(*words):
        code, out, err = run(*words)
        assert (code, out) == (2, ""), err
        assert err.count("\n") == 1, err
        assert err.startswith("layershare: error: "), err
        return err

    return call


def test_help_lists_the_verbs_and_loads_nothing_heavy():
    code = "import sys; from layershare.cli import main; main(['--help']); main(['plan', '--help'])"
    child = subprocess.run(
        [sys.executable, "-c", f"{code}; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    help_text, loaded = child.stdout.rsplit("\n", 2)[:2]
    assert [verb for verb in VERBS if f"\n  {verb} " not in help_text] == []
    assert not {"torch", "transformers", "datasets", "numpy", "scipy", "rich"} & set(loaded.split())


def test_no_arguments_show_the_help(run):
    assert run()[:2] == run("--help")[:2]


def test_version(run):
    assert run("--version") == (0, f"layershare {layershare.__version__}\n", "")


def test_python_dash_m_hands_on_the_exit_code(tmp_path):
    child = subprocess.run(
        [sys.executable, "-m", "layershare", "report", tmp_path], capture_output=True, text=True, check=False
    )
    assert child.returncode == 2
    assert child.stderr.startswith("layershare: error: ")


def test_every_verb_is_at_most_fifteen_lines():
    for verb in cli.VERBS:
        source = inspect.getsource(verb).splitlines()
        start = next(number for number, line in enumerate(source) if line.strip().startswith('"""'))
        assert len([line for line in source[start + 1 :] if line.strip()]) <= 15, verb


def test_plan_draws_and_prices_without_weights(run, bert_folder, tmp_path):
    (tmp_path / "config.json").write_text((bert_folder / "config.json").read_text())
    code, out, _ = run("plan", tmp_path, "--unique", 2, "-o", tmp_path / "plan.toml")
    assert code == 0
    assert "encoder.layer" in out
    assert "layer parameters" in out
    assert layershare.SharingPlan.load(tmp_path / "plan.toml").picture() in out


def test_plan_as_json_is_the_plan_and_its_price(run, bert_folder, tiny):
    code, out, _ = run("plan", bert_folder, "--budget", 0.6, "--json")
    answer = json.loads(out)
    plan = layershare.SharingPlan.from_dict(answer["plan"])
    cost = layershare.predict(layershare.find_stacks(tiny("bert")), plan)
    assert code == 0
    assert 0 < answer["predicted"]["ratio"] <= 0.6
    assert answer["predicted"]["layer_unique"] == cost.layer_unique


def test_share_saves_what_verify_accepts(run, bert_folder, tmp_path):
    out = tmp_path / "small one"
    assert run("share", bert_folder, "--preset", "cycle", "--unique", 2, "-o", out)[0] == 0
    code, answer, _ = run("verify", out, "--json")
    data = json.loads(answer)
    assert code == 0
    assert data["account"]["tied"] > 0
    assert layershare.SharingPlan.from_dict(data["plan"]) == layershare.SharingPlan.load(out / "plan.toml")
    assert (out / "tokenizer.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_share_keeps_the_modules_of_a_sentence_transformer(run, bert_folder, tmp_path):
    source = shutil.copytree(bert_folder, tmp_path / "source")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (source / "modules.json").write_text('[{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}]')
    assert run("share", source, "--unique", 2, "-o", tmp_path / "small")[0] == 0
    for name in ("modules.json", "1_Pooling/config.json"):
        assert (tmp_path / "small" / name).read_text() == (source / name).read_text()


def test_share_by_a_plan_file_with_calibration(run, bert_folder, pairs_file, tmp_path):
    assert run("plan", bert_folder, "--unique", 2, "--merge", "regmean", "-o", tmp_path / "p.toml")[0] == 0
    words = ["share", bert_folder, "--plan", tmp_path / "p.toml", "-o", tmp_path / "small"]
    code, _, err = run(*words, "--calibration", pairs_file, "--task", "sentence-embedding")
    assert code == 0, err


def test_evaluate_compares_side_by_side(run, bert_folder, pairs_file, tmp_path, monkeypatch):
    quick = functools.partial(compare, runs=3, seconds=0.1, memory=False)
    monkeypatch.setattr("layershare.measure.evaluate.compare", quick)
    assert run("share", bert_folder, "--unique", 2, "-o", tmp_path / "small")[0] == 0
    words = [
        "evaluate",
        bert_folder,
        tmp_path / "small",
        "--task",
        "sentence-embedding",
        "--data",
        pairs_file,
    ]
    code, out, err = run(*words, "--json")
    assert code == 0, err
    original, small = json.loads(out)["models"]
    assert small["layer_parameters_unique"] < original["layer_parameters_unique"]
    assert set(small["metrics"]) == set(original["metrics"])


def test_distill_heals_and_saves(run, bert_folder, pairs_file, tmp_path):
    assert run("share", bert_folder, "--unique", 2, "-o", tmp_path / "small")[0] == 0
    words = ["distill", tmp_path / "small", "--teacher", bert_folder, "--task", "sentence-embedding"]
    code, out, err = run(*words, "--data", pairs_file, "--steps", 2, "-o", tmp_path / "healed", "--json")
    assert code == 0, err
    assert json.loads(out)["history"]
    assert run("verify", tmp_path / "healed")[0] == 0
    assert not (tmp_path / "healed" / "checkpoints").exists()


def compress_words(folder, file, out):
    return ["compress", folder, "--task", "sentence-embedding", "--data", file, "-o", out]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["compress"], "model"),
        (["compres"], "compress"),
        (["plan", "MODEL", "--uniqe", "2"], "--uniqe"),
        (["plan", "MODEL", "--unique", "two"], "--unique"),
        (["plan", "MODEL", "--preset", "cyle", "--unique", "2"], "'cycle'"),
        (["plan", "MODEL", "--unique", "9"], "9"),
        (["plan", "MODEL", "--budget", "1.5"], "1.5"),
        (["plan", "MODEL", "--unique", "2", "--parts", "atention"], "'attention'"),
        (["plan", "MODEL", "--unique", "2", "--stack", "encoder.layers"], "'encoder.layer'"),
        (["plan", "MODEL", "--plan", "nowhere.toml"], "nowhere.toml"),
        (["plan", "./nowhere", "--unique", "2"], "./nowhere"),
        (["verify", "./nowhere"], "nowhere"),
        (["verify", "MODEL"], "no sharing plan"),
        (["report", "MODEL"], "result.json"),
        (["share", "MODEL", "--unique", "2", "-o", "MODEL"], "not an empty folder"),
        (["share", "MODEL", "--unique", "2", "-o", "OUT", "--calibration", "DATA"], "--task"),
        (["evaluate", "MODEL", "--task", "sentence-embeding", "--data", "DATA"], "'sentence-embedding'"),
        (["evaluate", "MODEL", "--task", "sentence-embedding", "--data", "nowhere.csv"], "nowhere.csv"),
        (
            ["evaluate", "MODEL", "--task", "sentence-embedding", "--data", "DATA", "--column", "text"],
            "ROLE=NAME",
        ),
    ],
)
def test_wrong_input_is_one_line_that_names_it(refused, bert_folder, pairs_file, tmp_path, words, named):
    real = {"MODEL": str(bert_folder), "DATA": str(pairs_file), "OUT": str(tmp_path / "out")}
    assert real.get(named, named) in refused(*(real.get(word, word) for word in words))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--budget", "1.5"], "1.5"),
        (["--budget", "0"], "0"),
        (["--scheme", "adjacnt"], "'adjacent'"),
        (["--task", "sentence-embeding"], "'sentence-embedding'"),
        (["--test", "nowhere.csv"], "nowhere.csv"),
        (["--data", "nowhere.csv"], "nowhere.csv"),
        (["--column", "text=sentenc1"], "'sentence1'"),
        (["--baseline", "dorp"], "drop"),
    ],
)
def test_compress_refuses_wrong_options(refused, bert_folder, pairs_file, tmp_path, options, named):
    assert named in refused(*compress_words(bert_folder, pairs_file, tmp_path / "out"), *options)


def test_compress_refuses_a_folder_in_use(refused, bert_folder, pairs_file, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    assert str(tmp_path) in refused(*compress_words(bert_folder, pairs_file, tmp_path))
    assert (tmp_path / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize("text", ["", "sentence1,sentence2,score\n"])
def test_compress_refuses_empty_data(refused, bert_folder, tmp_path, text):
    (tmp_path / "empty.csv").write_text(text)
    assert "empty.csv" in refused(*compress_words(bert_folder, tmp_path / "empty.csv", tmp_path / "out"))


def test_a_model_without_repeated_layers_is_refused(refused, tmp_path):
    from transformers import AlbertConfig, AlbertModel

    sizes = dict(vocab_size=30, embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=32)
    AlbertModel(AlbertConfig(num_hidden_layers=4, **sizes)).save_pretrained(tmp_path)
    assert "already shared" in refused("plan", tmp_path, "--unique", 2)


def test_where_nothing_can_be_written_is_one_line(refused, bert_folder, pairs_file):
    assert str(pairs_file) in refused(
        "encode", "red", "--model", bert_folder, "-o", pairs_file / "x.safetensors"
    )


def test_debug_shows_the_traceback_and_keeps_the_exit_code(run):
    code, out, err = run("verify", "./nowhere", "--debug")
    assert (code, out) == (2, "")
    assert "Traceback" in err
    assert err.rstrip().splitlines()[-1].startswith("layershare: error: ")


def test_ctrl_c_says_how_to_go_on(run, monkeypatch, tmp_path):
    def interrupted(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("layershare.report.write", interrupted)
    code, out, err = run("report", tmp_path)
    assert (code, out) == (130, "")
    assert err.count("\n") == 1
    assert "again" in err


def test_what_libraries_print_does_not_reach_stdout(run, monkeypatch, tmp_path):
    def chatty(folder):
        print("loss 0.1")  # noqa: T201
        return (Path("report.html"),)

    monkeypatch.setattr("layershare.report.write", chatty)
    assert run("report", tmp_path, "--json") == (
        0,
        '{\n  "written": [\n    "report.html"\n  ]\n}\n',
        "loss 0.1\n",
    )


def test_columns_are_pairs():
    assert answer.columns(["text=a=b", "score=c"]) == {"text": "a=b", "score": "c"}
    assert answer.columns(None) is None
    with pytest.raises(OptionError, match="ROLE=NAME"):
        answer.columns(["text"])
