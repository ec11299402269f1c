"""Searching a plan: no worse than any preset, the same under a seed however it is run, and refused in one line."""

import json
import sys
from functools import partial

import pytest
import torch

import layershare
from layershare.compress import compress
from layershare.errors import (
    DependencyError,
    LayershareError,
    ModelError,
    OptionError,
    PlanError,
    StoreError,
)
from layershare.plan import Group, SharingPlan, StackPlan
from layershare.search.beginning import Beginning, entry
from layershare.search.bench import Bench
from layershare.search.budget import for_layers, most_for_layers
from layershare.search.fitting import Fitted
from layershare.search.folder import search
from layershare.search.planner import plan_of_choice, space_of
from layershare.search.space import GROUPINGS, METHODS, Choice, as_parameters, begin_with, suggest
from layershare.search.study import Trials
from layershare.search.within import search_within
from layershare.sharing.layout import Job
from layershare.sharing.lowrank import root
from layershare.sharing.moments import measure
from layershare.sharing.search import Place
from layershare.stacks import find_stacks
from test_cli import run  # noqa: F401 - a fixture

optuna = pytest.importorskip("optuna")
BUDGET = 0.5


@pytest.fixture
def bench(tiny, batch_for):
    """A function: kind -> a bench on it."""

    def make(kind="bert"):
        model, draw = tiny(kind), torch.Generator().manual_seed(0)
        batches = [{"input_ids": torch.randint(5, 24, (16, 9), generator=draw)} for _ in range(2)]
        if kind == "t5":
            batches = [one | {"decoder_input_ids": one["input_ids"].flip(1)} for one in batches]
        with torch.no_grad():
            before = [model(**one)[0] for one in batches]

        def change(other):
            with torch.no_grad():
                pairs = zip(batches, before, strict=True)
                return sum(float((other(**one)[0] - was).square().sum()) for one, was in pairs) / 32

        return Bench(model, measure(model, batches), change, batches)

    return make


@pytest.fixture(scope="module")
def few(pairs_file, tmp_path_factory):
    """A few sentence pairs: a batch to fit on and a batch to judge by."""
    file = tmp_path_factory.mktemp("few") / "few.csv"
    file.write_text("".join(pairs_file.read_text().splitlines(keepends=True)[:25]))
    return file


@pytest.fixture(scope="module")
def done(bert_folder, few, tmp_path_factory):
    """A finished search, and its Result."""
    out = tmp_path_factory.mktemp("search") / "found"
    return out, search(bert_folder, out, budget=BUDGET, data=[few], trials=26, progress=lambda _: None)


def ratio(plan, model):
    return layershare.predict(find_stacks(model), plan).ratio


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_every_choice_spends_its_budget_and_no_more(bench, kind):
    made = bench(kind)
    stacks = find_stacks(made.model)
    order = [Place(stack.name, 1) for stack in stacks] + [Place(stacks[0].name, 2)]
    space, asked = space_of(stacks, order), optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    fits = 0
    for _ in range(8):
        choice = suggest(space, asked.ask())
        one = entry("", lambda choice=choice: plan_of_choice(stacks, choice, 0.6, made.fitted, order))
        if one.plan is not None:
            fits += 1
            assert 0.4 < ratio(one.plan, made.model) <= 0.6
            counts = layershare.count(made.share(one.plan), [stack.name for stack in stacks])
            assert counts.layer_unique == layershare.predict(stacks, one.plan).layer_unique
    assert fits > 4


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("grouping", ["alone", "pairs"])
@pytest.mark.parametrize("method", METHODS)
def test_factors_cut_from_one_decomposition_are_those_that_share_makes(bench, kind, grouping, method):
    made = bench(kind)
    stacks = find_stacks(made.model)
    space = space_of(stacks, [])
    base = next(choice for _, choice in begin_with(space))
    choice = Choice(
        groups=dict.fromkeys(space.parts, grouping),
        methods=dict.fromkeys(space.parts, method),
        favours=base.favours,
    )
    plan = plan_of_choice(stacks, choice, 0.7, made.fitted, [])
    other = layershare.share(made.model, plan, calibration=made.moments)
    batch = made.batches[0]
    with torch.no_grad():
        torch.testing.assert_close(made.share(plan)(**batch)[0], other(**batch)[0], rtol=1e-4, atol=1e-5)


def test_the_energies_of_one_matrix_are_its_singular_values_in_the_metric_of_the_answer(bench):
    made = bench()
    stack = find_stacks(made.model)[0]
    weight = next(one for one in stack.layers[1] if one.factorable)
    group = Group(positions=(1,), parts=(weight.name,), method="basis", rank=1)
    found = Fitted(made.model, made.moments).energies(Job(stack.name, group, weight, (1,)))
    name = f"{stack.name}.1.{weight.name}"
    before, after = (root(kind[name.rpartition(".")[0]]) for kind in made.moments)
    exact = torch.linalg.svdvals(after.T @ made.model.get_parameter(name).double() @ before).square()
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4 * exact.max().item())


def test_groupings_hold_every_position_once():
    for split in GROUPINGS.values():
        for number in range(1, 8):
            positions = list(range(3, 3 + number))
            assert sorted(p for group in split(positions) for p in group) == positions


def test_the_first_choices_have_a_value_for_every_number(bench):
    space = space_of(find_stacks(bench().model), [Place("encoder.layer", 1)])
    for _, choice in begin_with(space):
        trial = optuna.trial.FixedTrial(as_parameters(choice))
        assert suggest(space, trial) == choice


def test_it_is_no_worse_than_any_preset_or_auto_and_within_budget(done, tiny):
    out, result = done
    plan = SharingPlan.load(out / "plan.toml")
    changes = {one["name"]: one["change"] for one in result.trials if one["change"] is not None}
    best = min(one["change"] for one in result.trials if one["change"] is not None)
    assert {"auto", "drop", "basis", "own factors"} <= changes.keys()
    assert result.models[1].metrics["output change"] == best <= min(changes.values())
    assert result.plan == plan.model_dump(mode="json")
    assert ratio(plan, tiny("bert")) <= BUDGET
    assert len(result.trials) == 26


def test_more_processes_find_the_same(done, bert_folder, few, tmp_path):
    _, result = done
    again = search(
        bert_folder, tmp_path / "two", budget=BUDGET, data=[few], trials=26, jobs=2, progress=lambda _: None
    )
    assert again.trials == result.trials


def test_an_interrupted_search_goes_on_and_ends_the_same(done, bert_folder, few, tmp_path, monkeypatch):
    _, result = done
    calls = []
    measured = Bench.__call__

    def interrupt(self, plan):
        calls.append(plan)
        if len(calls) == 20:  # in the second generation
            raise KeyboardInterrupt
        return measured(self, plan)

    settings = dict(budget=BUDGET, data=[few], progress=lambda _: None)
    monkeypatch.setattr(Bench, "__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        search(bert_folder, tmp_path / "cut", trials=26, **settings)
    assert not (tmp_path / "cut" / "plan.toml").exists()
    resumed = search(bert_folder, tmp_path / "cut", trials=25, **settings)
    assert [one["index"] for one in resumed.trials] == list(range(25))
    more = search(bert_folder, tmp_path / "cut", trials=26, **settings)
    assert more.trials == result.trials
    possible = sum(one["change"] is not None for one in result.trials)
    assert len(calls) == possible + 1  # only the one that was cut off ran again


def test_a_budget_in_bytes_may_cut_the_table(bench):
    made = bench()
    whole = layershare.count(made.model).bytes_unique
    beginning = Beginning(made, int(0.8 * whole))
    assert beginning.space.tables[0] == 1 > beginning.space.tables[1]
    choice = next(choice for name, choice in begin_with(beginning.space) if name == "table at 0.5")
    plan = beginning.propose(choice)
    assert plan.tables
    assert layershare.count(made.share(plan)).bytes_unique <= 0.8 * whole


def test_bytes_that_leave_layers_only_with_a_narrow_table_are_no_mistake(tiny):
    model = tiny("bert", vocab_size=2000)
    whole = layershare.count(model)
    rest = whole.bytes_unique - 4 * whole.layer_unique
    with pytest.raises(PlanError, match="what is not layers"):
        for_layers(model, rest - 4)
    assert 0.9 < most_for_layers(model, rest - 4) <= 1
    with pytest.raises(PlanError, match="what is not layers"):
        most_for_layers(model, 100)


def test_a_plan_that_the_model_cannot_take_is_one_trial_less_and_no_end(
    done, bert_folder, few, tmp_path, monkeypatch
):
    measured = Bench.__call__

    def call(self, plan):
        if plan.stacks[0].drop:
            raise ModelError("it cannot be shortened.")
        return measured(self, plan)

    monkeypatch.setattr(Bench, "__call__", call)
    found = search(
        bert_folder, tmp_path / "out", budget=BUDGET, data=[few], trials=10, progress=lambda _: None
    )
    assert "it cannot be shortened." in [one["says"] for one in found.trials]
    assert any(one["change"] is not None for one in found.trials)


def test_a_model_shared_already_is_refused(bench):
    made = bench()
    made.model = layershare.share(made.model, layershare.make_plan(made.model, "all"))
    with pytest.raises(LayershareError, match="shared already"):
        Beginning(made, 0.5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(budget=0), "budget 0"),
        (dict(budget=1), "budget 1 "),
        (dict(budget=-0.5), "budget -0.5"),
        (dict(budget=100.0), "100 bytes"),
        (dict(budget=0.001), "out of reach"),
        (dict(trials=0), "trials = 0"),
        (dict(task="poetry"), "no task 'poetry'"),
        (dict(data=["nowhere.csv"]), "nowhere.csv"),
        (dict(columns={"text": "none"}), "none"),
        (dict(storage="nonsense"), "cannot be opened"),
        (dict(storage="mongodb://me:secret@host/x"), "me:[*]+@host"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(bert_folder, few, tmp_path, settings, words):
    settings = dict(budget=BUDGET, data=[few], progress=lambda _: None) | settings
    with pytest.raises(LayershareError, match=words) as failure:
        search(bert_folder, tmp_path / "out", **settings)
    assert "secret" not in str(failure.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_alone(done, bert_folder, few, pairs_file, tmp_path):
    out, _ = done
    settings = dict(data=[few], progress=lambda _: None)
    with pytest.raises(StoreError, match="another budget"):
        search(bert_folder, out, budget=0.6, **settings)
    head, *rows = pairs_file.read_text().splitlines(keepends=True)
    (tmp_path / "others.csv").write_text("".join([head, *rows[30:50]]))
    with pytest.raises(StoreError, match="another validation"):
        search(bert_folder, out, budget=BUDGET, validation=tmp_path / "others.csv", **settings)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(StoreError, match="not a folder of a search"):
        search(bert_folder, tmp_path / "mine", budget=0.5, **settings)


def test_without_optuna_it_says_what_to_install(bert_folder, few, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(DependencyError, match=r"pip install 'layershare\[search\]'"):
        search(bert_folder, tmp_path / "out", budget=0.5, data=[few])


def test_the_task_follows_from_the_class_of_the_model(tiny):
    from layershare.search.setting import task_for

    for name, task in [("GPT2LMHeadModel", "causal-lm"), ("BertModel", "sentence-embedding")]:
        config = tiny("bert").config
        config.architectures = [name]
        assert task_for(config) == task
    with pytest.raises(OptionError, match="--task"):
        task_for(tiny("t5").config)


def test_the_command_explains_its_choice(done, run, bert_folder, few):  # noqa: F811
    out, result = done
    command = ("plan", bert_folder, "--budget", BUDGET, "--data", few, "--trials", 26, "-o", out)
    code, text, _ = run(*command)
    assert code == 0
    best = min((one for one in result.trials if one["change"] is not None), key=lambda one: one["change"])
    assert f"chosen: trial {best['index']}, " in text
    assert f"{best['change']:.4g}" in text
    assert "auto" in text
    assert SharingPlan.load(out / "plan.toml").picture() in text
    assert f"--plan {out / 'plan.toml'}" in text
    code, text, _ = run(*command, "--json")
    assert json.loads(text)["trials"] == result.trials


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--rank", 4), "--rank does not go with --data"),
        (("--kv",), "--kv does not go with --data"),
        ((), "needs --out"),
        (("-o", "x"), "needs --budget"),
    ],
)
def test_options_that_do_not_go_together(run, bert_folder, few, extra, words):  # noqa: F811
    budget = () if "-o" in extra else ("--budget", 0.5)
    code, out, err = run("plan", bert_folder, "--data", few, *budget, *extra)
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_the_empty_plan_of_a_stack_changes_nothing(bench):
    made = bench()
    stack = find_stacks(made.model)[0]
    assert made(SharingPlan(stacks=(StackPlan(name=stack.name, length=stack.length),))) == 0


def test_compress_searches_within_its_run(bert_folder, few, tmp_path, monkeypatch):
    monkeypatch.setattr("layershare.compress.search_within", partial(search_within, trials=1))
    out, said = tmp_path / "out", []
    settings = dict(task="sentence-embedding", data=[few], steps=1, budget=0.6, progress=said.append)
    compress(bert_folder, out=out, scheme="search", **settings)
    rows = json.loads((out / "search.json").read_text())["trials"]
    best = min(
        (one for one in rows if one["change"] is not None), key=lambda one: (one["change"], one["index"])
    )
    assert SharingPlan.load(out / "plan.toml") == SharingPlan.from_dict(best["plan"])
    assert any(line.startswith("trial 0: ") for line in said)
    assert not (out / "search.db").exists()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql+psycopg2://me:secret@host/plans", "pip install psycopg2-binary"),
        ("mysql+nosuchdriver://me:secret@host/plans", "mysql+nosuchdriver"),
    ],
)
def test_a_database_without_its_driver_says_what_to_install(url, says, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    with pytest.raises((DependencyError, StoreError)) as caught:
        Trials(url, "a study")
    assert says in f"{caught.value.message} {caught.value.hint}"
    assert "secret" not in str(caught.value)
