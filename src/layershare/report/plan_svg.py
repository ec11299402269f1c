"""The plan as a picture: a column a position, a row a part; in a row, one colour is one set of weights.

Drawn from the plan's dict alone, so a report can be made where there is no model and no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from string import ascii_uppercase

from markupsafe import escape

from layershare.plan import Group, SharingPlan, StackPlan, describe
from layershare.report import svg

LEFT, TOP, ROW, GAP = 104, 26, 34, 3
HUES = (212, 24, 152, 280, 46, 338, 186, 100)  # neighbours far apart; letters tell them apart without colour
HATCH = (
    '<defs><pattern id="{name}" width="7" height="7" patternUnits="userSpaceOnUse" '
    'patternTransform="rotate(45)"><line class="hatch" x1="0" y1="0" x2="0" y2="7"/></pattern></defs>'
)
PRIVATE = "whatever no row names is private at every position"


@dataclass(frozen=True)
class Mark:
    """How the cells of one set of positions look: capital letters are ties, small ones shared bases."""

    letter: str
    hue: int


Marks = Mapping[tuple[tuple[int, ...], str], Mark]


def plan_svg(plan: Mapping) -> str:
    """A drawing and a legend for each stack of ``plan``, a ``SharingPlan`` as a dict.

    Raises:
        PlanError: the dict is not a plan.
    """
    stacks = SharingPlan.from_dict(dict(plan)).stacks
    return "".join(_figure(stack, hatch=f"hatch{number}") for number, stack in enumerate(stacks))


def _figure(stack: StackPlan, hatch: str) -> str:
    marks = mark(stack)
    picture = f'<div class="wide">{_picture(stack, marks, hatch)}</div>'
    return f'<figure class="plan"><h3>{escape(stack.name)}</h3>{picture}{_legend(stack, marks)}</figure>'


def _picture(stack: StackPlan, marks: Marks, hatch: str) -> str:
    cell = max(18.0, min(88.0, 640 / stack.length))
    parts = _parts(stack)
    middle = [LEFT + cell * position + (cell - GAP) / 2 for position in range(stack.length)]
    every = 1 if cell >= 24 else 5
    drawn = [HATCH.format(name=hatch)]
    drawn += [svg.text("tick mid", middle[p], TOP - 10, p) for p in range(0, stack.length, every)]
    for row, part in enumerate(parts):
        y = TOP + ROW * row
        drawn.append(svg.text("label end", LEFT - 12, y + ROW / 2 + 3, part))
        for position in range(stack.length):
            drawn += _cell(stack, position, part, marks, (LEFT + cell * position, y, cell - GAP), hatch)
    foot = TOP + ROW * len(parts)
    if stack.gates:
        digits = 2 if cell >= 32 else 1
        drawn.append(svg.text("label end", LEFT - 12, foot + 16, "gate"))
        drawn += [
            svg.text("gate mid", middle[g.position], foot + 16, f"{g.value:.{digits}f}") for g in stack.gates
        ]
        foot += 24
    width = LEFT + cell * stack.length
    title = f"{stack.name}: {len(stack.kept)} of {stack.length} positions kept, {len(marks)} shared sets"
    return svg.drawing(drawn, width, foot, title, style=f"width:{width:.0f}px")


def _cell(
    stack: StackPlan, position: int, part: str, marks: Marks, box: tuple[float, float, float], hatch: str
) -> list[str]:
    """``box`` is x, y and width in pixels."""
    x, y, width = box
    where, size = f"position {position}, {part}", (x, y, width, ROW - GAP)
    if position in stack.drop:
        return [svg.rect("dropped", *size, title=f"{where}: dropped", fill=f"url(#{hatch})")]
    group = _owner(stack, position, part)
    if group is None:
        drawn = [svg.rect("own", *size, title=f"{where}: its own weights")]
    else:
        look = marks[_key(group)]
        said = f"{where}: {look.letter}, {describe(group)}, positions {_list(group.positions)}"
        rank = f"+{group.rank}" if group.method == "tie" and group.rank and width >= 40 else ""
        drawn = [
            svg.rect(group.method, *size, title=said, style=f"--hue:{look.hue}"),
            svg.text("letter mid", x + width / 2, y + ROW / 2 + 3, look.letter + rank),
        ]
    if any(gate.position == position for gate in stack.gates):
        drawn.append(svg.rect("gated", *size, fill=f"url(#{hatch})"))
    return drawn


def _legend(stack: StackPlan, marks: Marks) -> str:
    """A line for every kind of cell that occurs."""
    lines = []
    for key, look in marks.items():
        group = next(group for group in stack.groups if _key(group) == key)
        swatch = f'<i class="swatch {group.method}" style="--hue:{look.hue}"></i>'
        lines.append(f"{swatch}{look.letter}: positions {_list(group.positions)}, {escape(describe(group))}")
    if any(_owner(stack, position, part) is None for position in stack.kept for part in _parts(stack)):
        lines.append('<i class="swatch own"></i>its own weights')
    if stack.drop:
        lines.append('<i class="swatch dropped"></i>dropped: does not run')
    if stack.gates:
        lines.append('<i class="swatch gated"></i>gated: runs, and the gate scales what it changes')
    if marks:
        lines.append(PRIVATE)
    return f'<ul class="legend">{"".join(f"<li>{line}</li>" for line in lines)}</ul>'


def mark(stack: StackPlan) -> dict[tuple[tuple[int, ...], str], Mark]:
    """(positions, method) -> look.  Rows that group the same positions look the same; letters are never repeated."""
    keys = dict.fromkeys(_key(group) for group in stack.groups if describe(group) != "private")
    marks = {}
    for number, (positions, method) in enumerate(keys):
        letter = ascii_uppercase[number % 26] + (str(number // 26) if number >= 26 else "")
        hue = HUES[number] if number < len(HUES) else round(number * 137.508) % 360  # the golden angle
        marks[positions, method] = Mark(letter.lower() if method == "basis" else letter, hue)
    return marks


def _parts(stack: StackPlan) -> list[str]:
    return list(dict.fromkeys(part for group in stack.groups for part in group.parts)) or ["layer"]


def _owner(stack: StackPlan, position: int, part: str) -> Group | None:
    """The group whose stored weights serve ``part`` at ``position``; None where the position has its own."""
    groups = (group for group in stack.groups if describe(group) != "private")
    return next((group for group in groups if position in group.positions and part in group.parts), None)


def _key(group: Group) -> tuple[tuple[int, ...], str]:
    return group.positions, group.method


def _list(positions: tuple[int, ...]) -> str:
    return ", ".join(map(str, positions))
