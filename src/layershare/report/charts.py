"""Charts as inline SVG, drawn from numbers alone; an empty string when there is nothing to draw."""

import math
from collections.abc import Mapping, Sequence

from layershare.report import svg
from layershare.result import Figures, Latency

WIDTH, BAR, STEP = 720, 24, 34


def curve(history: Sequence[Mapping], key: str, width: int = WIDTH, height: int = 240) -> str:
    """``key`` over ``step``: every point and, over many points, their running mean.

    The scale is logarithmic when the values span a factor of 20 or more.  What is not finite is skipped.
    """
    points = sorted(
        (entry["step"], entry[key])
        for entry in history
        if _finite(entry.get("step")) and _finite(entry.get(key))
    )
    if len(points) < 2:
        return ""
    steps, values = zip(*points, strict=True)
    log = min(values) > 0 and max(values) > 20 * min(values)
    scale = math.log10 if log else float
    low, high = scale(min(values)), scale(max(values))
    left, right, top, bottom = 64, width - 12, 14, height - 32

    def at(step: float, value: float) -> tuple[float, float]:
        x = left + (right - left) * (step - steps[0]) / ((steps[-1] - steps[0]) or 1)
        return x, bottom - (bottom - top) * (scale(value) - low) / ((high - low) or 1)

    marks = (decades if log else ticks)(min(values), max(values))
    levels = [at(steps[0], mark)[1] for mark in marks]
    drawn = [svg.line("grid", [(left, y), (right, y)]) for y in levels]
    drawn += [svg.text("tick end", left - 8, y + 4, f"{m:g}") for m, y in zip(marks, levels, strict=True)]
    drawn += [
        svg.text("tick mid", at(m, values[0])[0], bottom + 20, f"{m:g}") for m in ticks(steps[0], steps[-1])
    ]
    many = len(points) > 30
    drawn.append(svg.line("raw" if many else "line", [at(*point) for point in points]))
    end = values[-1]
    if many:
        mean = running_mean(values, max(1, len(values) // 40))
        drawn.append(svg.line("line", [at(*point) for point in zip(steps, mean, strict=True)]))
        end = mean[-1]
    drawn.append(svg.dot("dot", *at(steps[-1], end), 3.5, f"step {steps[-1]:g}: {key} {values[-1]:.4g}"))
    title = f"{key} over {len(points)} points, from {values[0]:.4g} to {values[-1]:.4g}"
    return svg.drawing(drawn, width, height, title)


def latency_bars(models: Sequence[Figures], batch: int, width: int = WIDTH) -> str:
    """A bar per model that was timed at this batch size; see :func:`time_bars`."""
    timed = [(place, model.label, model.speed(batch)) for place, model in enumerate(models)]
    rows = [(label, speed, tone(place)) for place, label, speed in timed if speed]
    return time_bars(rows, f"latency at batch {batch}", width)


def time_bars(rows: Sequence[tuple[str, Latency, str]], title: str, width: int = WIDTH) -> str:
    """A bar for each (label, time, tone): the median solid, up to the 95th percentile pale; milliseconds from zero."""
    bars = [
        (label, colour, speed.p50_ms, speed.p95_ms, f"{speed.p50_ms:.1f} ms (p95 {speed.p95_ms:.1f})")
        for label, speed, colour in rows
    ]
    return _bars(bars, width, title)


def parameter_bars(models: Sequence[Figures], width: int = WIDTH) -> str:
    """A bar per model: parameters stored in the layers solid, those in the rest (embeddings, heads) pale."""
    rows = []
    for place, model in enumerate(models):
        layers, total = model.layer_parameters_unique, model.parameters_unique
        said = f"{layers / 1e6:.2f} + {(total - layers) / 1e6:.2f} M"
        rows.append((model.label, tone(place), layers, total, said))
    return _bars(rows, width, "stored parameters, in the layers and in the rest")


def _bars(rows: Sequence[tuple[str, str, float, float, str]], width: int, title: str) -> str:
    """Rows of (label, tone, length of the solid bar, length up to which it is pale, text)."""
    if not rows:
        return ""
    left, right = min(240.0, 16 + 7.5 * max(len(row[0]) for row in rows)), width - 150
    unit = (right - left) / (max(row[3] for row in rows) or 1)
    drawn = []
    for row, (label, colour, solid, pale, said) in enumerate(rows):
        y = 4 + row * STEP
        drawn += [
            svg.text("label end", left - 10, y + 17, label),
            svg.rect(f"pale {colour}", left, y, max(1, pale * unit), BAR, rx=3),
            svg.rect(colour, left, y, max(1, solid * unit), BAR, rx=3),
            svg.text("value", left + pale * unit + 8, y + 17, said),
        ]
    return svg.drawing(drawn, width, STEP * len(rows), title)


def tone(place: int) -> str:
    """The original is grey, the result stands out, baselines share a third colour."""
    return ("original", "result")[place] if place < 2 else "baseline"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, about so many, 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * unit for unit in (1, 2, 5, 10) if power * unit >= raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten from ``low`` > 0 to ``high``; only the powers if there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    units = (1, 2, 5) if len(powers) <= 4 else (1,)
    marks = [unit * 10.0**power for power in powers for unit in units]
    return [mark for mark in marks if low <= mark <= high]


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """The mean of each value and of up to ``reach`` values on either side: no lag."""
    parts = (values[max(0, place - reach) : place + reach + 1] for place in range(len(values)))
    return [sum(part) / len(part) for part in parts]


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
