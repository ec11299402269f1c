"""The report: one HTML file with everything in it, readable offline, in light, dark and on paper."""

from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from layershare.report.charts import curve, latency_bars, parameter_bars
from layershare.report.plan_svg import plan_svg
from layershare.report.trade_off import trade_off
from layershare.result import BYTES_NOT_FLOPS, WHY, Figures, Result, percent, spell


def html(result: Result) -> str:
    """``result`` as a self-contained page: no script, no font, no image, no style from elsewhere.

    Raises:
        PlanError: ``result.plan`` is not a plan.
    """
    here = files("layershare.report")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((here / "page.html.j2").read_text(encoding="utf-8"))
    batches = list(dict.fromkeys(speed.batch for model in result.models for speed in model.latency))
    return template.render(
        result=result,
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        tiles=tiles(result),
        rows=result.rows(),
        percent=percent,
        bytes_not_flops=BYTES_NOT_FLOPS,
        why=WHY,
        spell=spell,
        plan=Markup(plan_svg(result.plan)) if result.plan else "",
        parameters=Markup(parameter_bars(result.models)),
        loss=Markup(curve(result.history, "loss")),
        quality=Markup(curve(result.history, quality)) if (quality := quality_key(result)) else "",
        quality_name=quality_key(result),
        trade_off=Markup(trade_off(result)),
        latencies=[(shape(result, batch), Markup(latency_bars(result.models, batch))) for batch in batches],
        provenance=provenance(result),
    )


def tiles(result: Result) -> list[tuple[str, str]]:
    """The figures a reader looks for first: (value, what it is a share of), without those not measured."""
    shares = {
        "of layer parameters": lambda model: model.layer_parameters_unique,
        f"of {spell(result.metric)}": lambda model: model.metrics.get(result.metric),
        "of bytes on disk": lambda model: model.bytes_on_disk,
        f"of compute per {result.unit}": lambda model: model.flops_per_text,
        "of time at batch 1": _first_p50,
    }
    found = {name: result.ratio(figure) for name, figure in shares.items()}
    return [(percent(share), name) for name, share in found.items() if share is not None]


def quality_key(result: Result) -> str:
    """The key of the history that follows the headline metric during training, or ''."""
    keys = dict.fromkeys(key for entry in result.history for key in entry)
    return next((key for key in keys if result.metric and key.endswith(result.metric)), "")


def provenance(result: Result) -> list[tuple[str, str]]:
    """Everything needed to repeat the run, as (name, value) lines; what is unknown is left out."""
    lines = [
        ("command", result.command),
        ("source", result.source),
        ("task", result.task),
        ("seed", "" if result.seed is None else str(result.seed)),
        *((f"data: {key}", _flat(value)) for key, value in result.data.items()),
        ("versions", ", ".join(f"{name} {version}" for name, version in result.versions.items())),
        ("machine", result.machine),
        ("time", ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())),
        ("created", result.created),
    ]
    return [(name, value) for name, value in lines if value]


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_flat(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return "\n".join(map(_flat, value))
    return "" if value is None else str(value)


def _first_p50(model: Figures) -> float | None:
    return speed.p50_ms if (speed := model.speed(1)) else None


def shape(result: Result, batch: int) -> str:
    """What was timed at this batch size, and how often: ``Batch 32, 14 tokens, 24 runs each``."""
    speed = next(speed for model in result.models if (speed := model.speed(batch)))
    tokens = f", {speed.tokens} tokens" if speed.tokens else ""
    return f"Batch {batch}{tokens}, {speed.runs} runs each"
