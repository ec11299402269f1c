"""The page is well-formed and alone; the picture shows exactly the plan; the card is what the hub expects."""

import ast
import re
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import transformers

from layershare import report
from layershare.errors import PlanError, StoreError
from layershare.plan import SharingPlan
from layershare.report.charts import curve, decades, latency_bars, parameter_bars, running_mean, ticks
from layershare.report.plan_svg import mark, plan_svg
from layershare.result import Figures, Latency, Result
from layershare.tasks import TASKS

PLAN: dict[str, Any] = {
    "stacks": [
        {
            "name": "encoder.layer",
            "length": 6,
            "groups": [
                {"positions": [1, 2], "parts": ["attention"], "method": "tie", "merge": "mean", "rank": 8},
                {"positions": [3, 4], "parts": ["attention"], "method": "tie", "merge": "mean", "rank": 0},
                {"positions": [1, 2], "parts": ["ffn"], "method": "tie", "merge": "mean", "rank": 0},
                {"positions": [3, 4], "parts": ["ffn"], "method": "basis", "merge": "mean", "rank": 96},
            ],
            "drop": [5],
            "gates": [{"position": 4, "value": 0.73}],
        }
    ]
}
NASTY = "<script>alert('&')</script>"


def figures(label: str, layers: int, milliseconds: float) -> Figures:
    return Figures(
        label=label,
        metrics={"spearman": 0.8},
        parameters_unique=layers + 1000,
        parameters_effective=2000,
        layer_parameters_unique=layers,
        layer_parameters_effective=1000,
        latency=[
            Latency(
                batch=batch, p50_ms=milliseconds * batch, p95_ms=2 * milliseconds * batch, runs=9, tokens=14
            )
            for batch in (1, 32)
        ],
    )


def made(**more) -> Result:
    values: dict[str, Any] = {
        "task": "sentence-embedding",
        "metric": "spearman",
        "source": "owner/model",
        "models": [figures("original", 1000, 2.0), figures("shared", 502, 1.0), figures("drop", 500, 1.0)],
        "plan": PLAN,
        "plan_picture": "A A B B",
        "history": [{"step": step, "loss": 1 / (1 + step), "validation_spearman": 0.1} for step in range(50)],
        "data": {"files": {"folder/train.csv": "ab12"}, "sizes": {"train": 3}, "labels": []},
        "seed": 7,
        "command": "layershare compress a --budget 0.5",
    }
    return Result(**{**values, **more})


def parsed(page: str) -> ET.Element:
    return ET.fromstring(page.removeprefix("<!DOCTYPE html>"))


def drawn(plan: dict) -> ET.Element:
    return ET.fromstring(f"<div>{plan_svg(plan)}</div>")


def titles(plan: dict) -> dict[str, str]:
    """'position 1, attention' -> what the cell says about itself."""
    return dict((title.text or "").split(": ", 1) for title in drawn(plan).iter("title"))


def test_the_page_is_well_formed_and_says_the_headline():
    page = parsed(report.html(made()))
    heading = page.find(".//h1")
    assert heading is not None
    assert heading.text == made().headline()
    assert len(page.findall(".//section")) == 6
    assert "Sharing saves bytes, not FLOPs." in "".join(page.itertext())


def test_the_page_refers_to_nothing_outside():
    page = report.html(made())
    assert not re.search(r"https?://|//\w|@import|\bsrc=|\bhref=|<script|<link|<iframe|<object", page)
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", page))


def test_the_table_on_the_page_has_every_value():
    result = made()
    body = parsed(report.html(result)).find(".//tbody")
    assert body is not None
    cells = [[(cell.text or "") for cell in row] for row in body]
    assert [row[0] for row in cells] == [row.label for row in result.rows()]
    for cell, row in zip(cells, result.rows(), strict=True):
        assert (cell[1], cell[2], cell[4]) == row.values


def test_latencies_say_on_what_and_how_often_they_were_measured():
    said = [heading.text for heading in parsed(report.html(made())).iter("h3")]
    assert "Batch 32, 14 tokens, 9 runs each" in said


def test_text_from_outside_is_text_not_markup():
    models = [figures(NASTY, 1000, 2.0), figures("shared", 502, 1.0)]
    plan = {"stacks": [{"name": NASTY, "length": 2, "groups": [{"positions": [0, 1], "parts": [NASTY]}]}]}
    page = report.html(
        made(command=NASTY, notes=[NASTY], models=models, plan=plan, data={NASTY: NASTY}, source=NASTY)
    )
    assert "<script" not in page
    assert "".join(parsed(page).itertext()).count(NASTY) >= 8


@pytest.mark.parametrize("missing", ["plan", "history", "latency", "others"])
def test_the_page_does_without_what_was_not_measured(missing):
    bare = figures("original", 1000, 2.0).model_copy(update={"latency": []})
    changes: dict[str, dict[str, Any]] = {
        "plan": {"plan": None},
        "history": {"history": []},
        "latency": {"models": [bare, bare.model_copy(update={"label": "shared"})]},
        "others": {"models": [bare]},
    }
    parsed(report.html(made(**changes[missing])))


def test_every_position_of_every_part_is_drawn_once_and_says_what_it_is():
    cells = titles(PLAN)
    assert len(cells) == 6 * 2
    assert cells["position 0, attention"] == "its own weights"
    assert cells["position 1, attention"].startswith("A, tied (mean) + private rank 8")
    assert cells["position 2, ffn"].startswith("A, tied")
    assert cells["position 3, attention"].startswith("B, tied")
    assert cells["position 4, ffn"].startswith("c, shared basis of rank 96")
    assert cells["position 5, ffn"] == "dropped"


def test_within_a_row_one_colour_is_one_set_of_weights():
    boxes = [box for box in drawn(PLAN).iter("rect") if box.get("class") in ("tie", "basis")]
    looks: dict[tuple[str, str], set[str | None]] = {}
    for box in boxes:
        where, said = (box.findtext("title") or "").split(": ", 1)
        looks.setdefault((where.split(", ")[1], said.split(",")[0]), set()).add(box.get("style"))
    assert all(len(styles) == 1 for styles in looks.values())
    assert looks["attention", "A"] != looks["attention", "B"]
    assert looks["ffn", "A"] != looks["ffn", "c"]


def test_gates_are_hatched_and_show_their_value():
    picture = drawn(PLAN)
    assert [text.text for text in picture.iter("text") if text.get("class") == "gate mid"] == ["0.73"]
    assert len([box for box in picture.iter("rect") if box.get("class") == "gated"]) == 2


def test_the_picture_is_the_same_from_a_plan_with_its_defaults_left_out():
    full = SharingPlan.from_dict(PLAN)
    assert plan_svg(full.to_dict()) == plan_svg(full.model_dump()) == plan_svg(PLAN)


def test_letters_are_never_repeated_however_many_groups():
    groups = [{"positions": [start, start + 1]} for start in range(0, 120, 2)]
    stack = SharingPlan.from_dict({"stacks": [{"name": "layers", "length": 120, "groups": groups}]}).stacks[0]
    assert len({look.letter for look in mark(stack).values()}) == 60


def test_a_plan_that_only_drops_is_drawn_too():
    assert titles({"stacks": [{"name": "layer", "length": 2, "drop": [1]}]}) == {
        "position 0, layer": "its own weights",
        "position 1, layer": "dropped",
    }


def test_a_wrong_plan_is_refused():
    with pytest.raises(PlanError, match="Did you mean 'drop'"):
        plan_svg({"stacks": [{"name": "layer", "length": 2, "dropp": [1]}]})


def test_bars_are_as_long_as_their_numbers():
    widths = [
        float(box.get("width", 0)) for box in ET.fromstring(latency_bars(made().models, 32)).iter("rect")
    ]
    p95, p50 = widths[0::2], widths[1::2]
    assert p95[0] == pytest.approx(2 * p50[0], rel=0.01)
    assert p50[0] == pytest.approx(2 * p50[1], rel=0.01)
    bars = ET.fromstring(parameter_bars(made().models)).iter("rect")
    total, layers, *_ = [float(box.get("width", 0)) for box in bars]
    assert total == pytest.approx(2 * layers, rel=0.01)


def test_a_curve_skips_what_is_not_a_number_and_needs_two_points():
    entries: list[dict[str, Any]] = [
        {"step": 0, "loss": 1.0},
        {"step": 1, "loss": float("nan")},
        {"step": 2, "loss": "NaN"},
        {"step": 3},
    ]
    assert curve(entries, "loss") == ""
    line = ET.fromstring(curve([*entries, {"step": 4, "loss": 0.5}], "loss")).find("polyline[@class='line']")
    assert line is not None
    assert len(line.get("points", "").split()) == 2


def test_a_flat_curve_is_drawn():
    ET.fromstring(curve([{"step": step, "loss": 0.0} for step in range(3)], "loss"))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 2.7), (-3, 3), (0, 300), (1e-7, 3e-7), (5, 5)])
def test_ticks_are_few_round_and_inside(low, high):
    marks = ticks(low, high)
    assert 1 <= len(marks) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in marks)
    assert all(len(f"{tick:g}") <= 7 for tick in marks)


def test_decades_lie_inside():
    assert decades(0.3, 30) == pytest.approx([0.5, 1, 2, 5, 10, 20])
    assert decades(1e-6, 1) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1])


def test_the_running_mean_has_no_lag():
    assert running_mean([1.0, 2.0, 3.0, 4.0, 5.0], 1) == [1.5, 2.0, 3.0, 4.0, 4.5]


def test_the_card_is_one_the_hub_can_read():
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard(report.model_card(made())).data.to_dict()
    assert data["base_model"] == "owner/model"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "sentence-similarity"
    assert "layershare" in data["tags"]


@pytest.mark.parametrize(
    ("task", "tag"),
    [
        ("token-classification", "token-classification"), ("translation", "translation"),
        ("summarization", "summarization"), ("masked-lm", "fill-mask"), ("causal-lm", "text-generation"),
    ],
)  # fmt: skip
def test_the_hub_is_told_what_the_model_is_for(task, tag):
    assert f"\npipeline_tag: {tag}\n" in report.model_card(made(task=task))


@pytest.mark.parametrize("task", TASKS)
def test_the_lines_that_load_the_model_are_python_and_name_what_there_is(task):
    (code,) = re.findall(r"```python\n(.*?)```", report.model_card(made(task=task)), flags=re.DOTALL)
    names = [
        alias.name
        for line in ast.parse(code).body if isinstance(line, ast.ImportFrom)
        for alias in line.names
    ]  # fmt: skip
    assert all(hasattr(transformers, name) for name in names)
    assert code.count(".from_pretrained(") == len(names)


def test_the_card_shows_table_plan_and_data_but_no_local_path(tmp_path):
    result = made(source=str(tmp_path / "mine"))
    card = report.model_card(result)
    assert result.markdown() in card
    assert "A A B B" in card
    assert "train.csv, sha256 `ab12`" in card
    assert "base_model" not in card
    assert str(tmp_path) not in card
    assert "folder/" not in card


def test_a_local_folder_is_not_taken_for_a_hub_name(tmp_path, monkeypatch):
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in report.model_card(made())


def test_write_puts_page_and_card_beside_the_result(tmp_path):
    made().save(tmp_path)
    page, card = report.write(tmp_path)
    assert (page, card) == (tmp_path / "report.html", tmp_path / "README.md")
    assert page.read_text(encoding="utf-8") == report.html(Result.load(tmp_path))
    assert card.read_text(encoding="utf-8") == report.model_card(Result.load(tmp_path))
    with pytest.raises(StoreError, match=r"result\.json"):
        report.write(tmp_path / "elsewhere")
