"""The few SVG elements the report draws with.  Pure text; everything that comes from outside is escaped.

Colours are classes of the page's style sheet, so one drawing serves light, dark and print.
"""

from collections.abc import Iterable

from markupsafe import escape


def drawing(elements: Iterable[str], width: float, height: float, title: str, style: str = "") -> str:
    """An inline ``<svg>`` that scales with the page; ``title`` is read out to those who cannot see it."""
    box = f"0 0 {number(width)} {number(height)}"
    return (
        f"<svg{attributes(viewBox=box, role='img', aria_label=title, style=style)}>{''.join(elements)}</svg>"
    )


def text(name: str, x: float, y: float, content: object) -> str:
    return f"<text{attributes(class_=name, x=x, y=y)}>{escape(content)}</text>"


def rect(
    name: str,
    x: float,
    y: float,
    width: float,
    height: float,
    *,
    rx: float = 4,
    title: str = "",
    fill: str = "",
    style: str = "",
) -> str:
    shape = attributes(class_=name, x=x, y=y, width=width, height=height, rx=rx, fill=fill, style=style)
    return f"<rect{shape}>{_title(title)}</rect>"


def line(name: str, points: Iterable[tuple[float, float]]) -> str:
    path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return f"<polyline{attributes(class_=name, points=path)}/>"


def dot(name: str, x: float, y: float, r: float, title: str) -> str:
    return f"<circle{attributes(class_=name, cx=x, cy=y, r=r)}>{_title(title)}</circle>"


def attributes(**values: object) -> str:
    """``class_`` is class, ``aria_label`` is aria-label; what is empty is left out."""
    said = {key.rstrip("_").replace("_", "-"): value for key, value in values.items() if value != ""}
    return "".join(f' {key}="{_value(value)}"' for key, value in said.items())


def number(value: float) -> str:
    """At most one decimal: 0.1 px is finer than any screen."""
    return f"{value:.1f}".removesuffix(".0")


def _value(value: object) -> str:
    return number(value) if isinstance(value, int | float) else str(escape(value))


def _title(said: str) -> str:
    return f"<title>{escape(said)}</title>" if said else ""
