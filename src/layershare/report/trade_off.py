"""Quality against speed: one line over the thresholds of an early exit."""

from importlib import resources

from layershare.report import svg
from layershare.report.charts import WIDTH, ticks
from layershare.result import Result, spell

LEAST_SPAN = 0.01
"""Of the quality axis: differences below it are noise, and shall look like it."""


def trade_off(result: Result, width: int = WIDTH, height: int = 300) -> str:
    """The points of ``result.curve`` as an inline SVG, the chosen one named; "" without any.

    Across: how many times as fast as full depth. Upwards: the headline metric. The grey dot is full depth.
    """
    points = sorted((one["times_as_fast"], one["quality"], one["threshold"]) for one in result.curve)
    if len(points) < 2:
        return ""
    chosen = next((one["threshold"] for one in result.curve if one.get("chosen")), None)
    before = result.models[0].metrics.get(result.metric, 0.0)
    shown = [quality for _, quality, _ in points] + [before]
    high = max(shown)
    low = min(*shown, high - LEAST_SPAN)
    slow, fast = min(1.0, points[0][0]), points[-1][0]
    left, right, top, bottom = 64, width - 24, 20, height - 48

    def at(speed: float, quality: float) -> tuple[float, float]:
        x = left + (right - left) * (speed - slow) / ((fast - slow) or 1)
        return x, bottom - (bottom - top) * (quality - low) / (high - low)

    drawn = []
    for mark in ticks(low, high):
        y = at(slow, mark)[1]
        drawn += [
            svg.line("grid", [(left, y), (right, y)]),
            svg.text("tick end", left - 8, y + 4, f"{mark:g}"),
        ]
    drawn += [
        svg.text("tick mid", at(mark, low)[0], bottom + 20, f"{mark:g}") for mark in ticks(slow, fast, 8)
    ]
    drawn.append(svg.text("tick mid", (left + right) / 2, bottom + 40, "times as fast as full depth"))
    drawn.append(svg.text("tick", 8, 12, spell(result.metric)))
    drawn.append(svg.line("line", [at(speed, quality) for speed, quality, _ in points]))
    for speed, quality, threshold in points:
        said = f"threshold {threshold:.4g}: {quality:.4f}, {speed:.2f} times as fast"
        drawn.append(svg.dot("dot", *at(speed, quality), 3.5, said))
    drawn.append(svg.dot("original", *at(1.0, before), 6, f"full depth: {before:.4f}"))
    for speed, quality, threshold in points:
        if threshold == chosen:
            x, y = at(speed, quality)
            drawn += [
                svg.dot("result", x, y, 7, f"chosen: threshold {threshold:.4g}"),
                svg.text("label mid", min(max(x, left + 64), right - 64), y + 28, f"{quality:.4f} at {speed:.2f} x"),
            ]  # fmt: skip
    title = f"{spell(result.metric)} against speed, {len(points)} thresholds"
    return svg.drawing(drawn, width, height, title)


def picture(result: Result) -> str:
    """:func:`trade_off` as a file of its own, in the colours of the page."""
    style = resources.files("layershare.report").joinpath("page.css").read_text(encoding="utf-8")
    rules = [line for line in style.splitlines() if line.startswith("svg")]
    rules.append("text { font-family: system-ui, sans-serif; }")
    colours = style[: style.index("* {")]
    drawn = trade_off(result)
    head, _, rest = drawn.partition(">")
    return (
        f'{head} xmlns="http://www.w3.org/2000/svg"><style>{colours}{"".join(rules)}</style>'
        f'<rect width="100%" height="100%" fill="var(--card)"/>{rest}\n'
    )
