"""A plan is plain data: what is wrong in it is said at once, in the user's words, and nothing is lost on disk."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layershare.config import Config
from layershare.errors import OptionError, PlanError
from layershare.plan import FORMAT_VERSION, Gate, Group, SharingPlan, StackPlan, describe


def plan(**stack) -> dict:
    return {"version": 1, "stacks": [{"name": "encoder.layer", "length": 6, **stack}]}


@st.composite
def plans(draw) -> SharingPlan:
    return SharingPlan(
        stacks=tuple(draw(stacks(f"s{i}.layer")) for i in range(draw(st.integers(0, 2)))),
    )


@st.composite
def stacks(draw, name: str) -> StackPlan:
    length = draw(st.integers(1, 30))
    used = draw(st.lists(st.integers(0, length - 1), unique=True, max_size=length))
    role = {position: draw(st.sampled_from("dabc")) for position in used}
    drop = [p for p in used if role[p] == "d"][: length - 1]
    groups = []
    for letter in "abc":
        if positions := [p for p in used if role[p] == letter]:
            basis, pick = draw(st.booleans()), draw(st.booleans())
            groups.append(
                Group(
                    positions=positions,
                    parts=draw(st.sampled_from([("attention",), ("ffn", "norm"), ("*.weight",)])),
                    method="basis" if basis else "tie",
                    merge="pick" if pick else draw(st.sampled_from(["first", "last", "mean", "regmean"])),
                    source=draw(st.sampled_from(positions)) if pick else None,
                    rank=draw(st.integers(1 if basis else 0, 99)),
                    side=draw(st.sampled_from(["input", "output"])),
                )
            )
    gates = [
        Gate(position=p, value=draw(st.floats(-2, 2))) for p in used if role[p] != "d" and draw(st.booleans())
    ]
    return StackPlan(name=name, length=length, groups=groups, gates=gates, drop=drop)


@settings(max_examples=60, deadline=None)
@given(plans())
def test_text_and_back(made):
    assert SharingPlan.from_toml(made.to_toml()) == made
    assert SharingPlan.from_json(made.to_json()) == made
    assert SharingPlan.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert str(made) == made.picture()


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_file_and_back(tmp_path, suffix):
    made = SharingPlan.from_dict(plan(groups=[{"positions": [0, 1], "rank": 2}], drop=[5]))
    made.save(tmp_path / f"plan.{suffix}")
    assert SharingPlan.load(tmp_path / f"plan.{suffix}") == made
    assert [file.name for file in tmp_path.iterdir()] == [f"plan.{suffix}"]


WRONG = {
    "misspelt key": (plan(grups=[]), "unknown key 'stacks.0.grups'. Did you mean 'groups'?"),
    "misspelt key deep": (plan(groups=[{"positions": [0], "merg": "mean"}]), "Did you mean 'merge'?"),
    "misspelt key of a gate": (plan(gates=[{"positoin": 0}]), "Did you mean 'position'?"),
    "misspelt value": (plan(groups=[{"positions": [0], "merge": "average"}]), "'average'"),
    "no position": (plan(groups=[{"positions": []}]), "at least one position"),
    "no parts": (plan(groups=[{"positions": [3], "parts": []}]), "[3] names no parts"),
    "doubled position": (plan(groups=[{"positions": [3, 1, 3]}]), "position 3 is named twice in [3, 1, 3]"),
    "negative position": (plan(groups=[{"positions": [-1, 1]}]), "[-1, 1]"),
    "position beyond": (plan(groups=[{"positions": [0, 6]}]), "'encoder.layer' has positions 0 to 5, given: 6"),
    "gate beyond": (plan(gates=[{"position": 7}]), "given: 7"),
    "drop beyond": (plan(drop=[9]), "given: 9"),
    "dropped and shared": (plan(drop=[2], groups=[{"positions": [1, 2]}]), "position 2"),
    "dropped and gated": (plan(drop=[2], gates=[{"position": 2}]), "position 2"),
    "all dropped": (plan(drop=list(range(6))), "all positions of stack 'encoder.layer'"),
    "two gates": (plan(gates=[{"position": 1}, {"position": 1}]), "two gates: [1, 1]"),
    "gate without a number": (plan(gates=[{"position": 1, "value": float("nan")}]), "finite"),
    "two groups": (plan(groups=[{"positions": [0, 1]}, {"positions": [1, 2]}]), "position 1"),
    "the same group twice": (plan(groups=[{"positions": [0, 1]}] * 2), "'attention' in two groups"),
    "pick without source": (plan(groups=[{"positions": [0, 1], "merge": "pick"}]), "source"),
    "source without pick": (plan(groups=[{"positions": [0, 1], "source": 0}]), "source"),
    "source elsewhere": (plan(groups=[{"positions": [0, 1], "merge": "pick", "source": 40}]), "given: 40"),
    "basis without rank": (plan(groups=[{"positions": [0, 1], "method": "basis"}]), "positions [0, 1] needs a rank"),
    "negative rank": (plan(groups=[{"positions": [0, 1], "rank": -3}]), "-3"),
    "no length": ({"stacks": [{"name": "a"}]}, "stacks.0.length"),
    "length zero": ({"stacks": [{"name": "a", "length": 0}]}, "stacks.0.length"),
    "stack twice": ({"stacks": [{"name": "a", "length": 2}] * 2}, "['a', 'a']"),
    "newer version": ({"version": FORMAT_VERSION + 1}, f"format version {FORMAT_VERSION + 1}"),
    "newer version, new key": ({"version": 99, "tuned": True}, "format version 99"),
    "version zero": ({"version": 0}, "version"),
    "no table": (["a"], "plan.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case):
    values, words = WRONG[case]
    with pytest.raises(PlanError) as caught:
        SharingPlan.from_dict(values, "plan.json")
    assert words in str(caught.value)
    assert str(caught.value).startswith("plan.json: ")


@pytest.mark.parametrize(("read", "text"), [("from_toml", "stacks = ["), ("from_json", "{")])
def test_broken_text_names_the_file(read, text):
    with pytest.raises(PlanError, match="my-plan"):
        getattr(SharingPlan, read)(text, "my-plan")


@pytest.mark.parametrize("name", ["missing.toml", "plan.yaml", "folder.json", "binary.toml"])
def test_unreadable_files_are_named(tmp_path, name):
    (tmp_path / "plan.yaml").write_text("version: 1")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(PlanError, match=name):
        SharingPlan.load(tmp_path / name)


@pytest.mark.parametrize("name", ["plan.yaml", "nowhere/plan.toml"])
def test_unwritable_files_are_named(tmp_path, name):
    with pytest.raises(PlanError, match=name):
        SharingPlan().save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_plans_are_frozen_and_sorted():
    assert Group(positions=(2, 0)) == Group(positions=(0, 2))
    with pytest.raises(ValueError, match="frozen"):
        Group(positions=(0,)).rank = 3
    assert SharingPlan.from_dict(plan(drop=[4, 1])).stacks[0].kept == (0, 2, 3, 5)


def test_picture():
    made = SharingPlan.from_dict(
        plan(
            groups=[
                {"positions": [0, 1], "parts": ["attention"], "rank": 2},
                {"positions": [1, 4], "parts": ["ffn"], "method": "basis", "rank": 8},
            ],
            gates=[{"position": 1, "value": 0.25}],
            drop=[5],
        )
    )
    assert [line.rstrip() for line in made.picture().splitlines()] == [
        "encoder.layer     0    1    2    3    4    5",
        "attention         A    A    .    .    .    x",
        "ffn               .    b    .    .    b    x",
        "gate                0.25",
        "               A: tied (mean) + private rank 2",
        "               b: shared basis of rank 8, input side",
    ]
    assert SharingPlan().picture() == "nothing is shared"


def test_picture_of_many_groups_stays_in_columns():
    groups = [
        {"positions": [p], "parts": [f"{part}*"], "method": "basis", "rank": 1} for p in range(9) for part in "abcd"
    ]  # fmt: skip
    rows = (
        SharingPlan.from_dict({"stacks": [{"name": "s", "length": 9, "groups": groups}]})
        .picture()
        .splitlines()
    )
    assert len({len(row) for row in rows[:5]}) == 1


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (Group(positions=(0, 1), merge="pick", source=1), "tied (from 1)"),
        (Group(positions=(0,)), "private"),
        (Group(positions=(0,), method="basis", rank=4), "low-rank factors of rank 4"),
        (
            Group(positions=(0, 1), method="basis", rank=4, side="output"),
            "shared basis of rank 4, output side",
        ),
    ],
)
def test_description(group, words):
    assert describe(group) == words


def test_config_names_the_option():
    class Settings(Config):
        steps: int = 1

    with pytest.raises(OptionError, match=r"recipe.yaml: unknown key 'step'. Did you mean 'steps'"):
        Settings.parse({"step": 3}, where="recipe.yaml")
    assert Settings.parse({"steps": 3}).steps == 3
