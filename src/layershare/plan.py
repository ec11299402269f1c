"""SharingPlan: which positions of which stack share which parts, and how. Knows no torch.

A plan is written before any weight moves. It can be printed, compared, saved as TOML or JSON, edited by hand and
searched. ``layershare.share`` applies it.
"""

import json
import tomllib
from collections import Counter
from pathlib import Path
from string import ascii_uppercase
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from layershare.config import Config
from layershare.errors import PlanError
from layershare.result import write_atomic

FORMAT_VERSION = 1
Method = Literal["tie", "basis", "atoms"]
Merge = Literal["first", "last", "pick", "mean", "regmean"]


def _ascending(positions: tuple[int, ...]) -> tuple[int, ...]:
    if any(position < 0 for position in positions):
        raise ValueError(f"positions count from 0, given: {list(positions)}")
    if doubled := [position for position, times in Counter(positions).items() if times > 1]:
        raise ValueError(f"position {doubled[0]} is named twice in {list(positions)}")
    return tuple(sorted(positions))


Positions = Annotated[tuple[int, ...], AfterValidator(_ascending)]


class Group(Config):
    """Positions that share the same parts.

    ``method="tie"``: one stored tensor serves all positions, made from theirs by ``merge``; with ``rank`` > 0 each
    position keeps a private low-rank correction of that rank. ``method="basis"``: each matrix is a product of two
    factors of inner size ``rank``; the one on ``side`` is stored once for the group, the other one per position; with
    ``side="both"`` one low-rank matrix, made from theirs by ``merge``, serves all. A group of one position is then a
    plain low-rank factorisation. ``method="atoms"``: each matrix is a mix of ``atoms`` matrices that are stored once
    for the group, with as many private coefficients (MASA).
    """

    positions: Positions
    parts: tuple[str, ...] = ("attention", "ffn")
    """Part names (``attention``, ``ffn``, ``other``, ``norm``) or globs over parameter names inside the layer."""
    method: Method = "tie"
    merge: Merge = "mean"
    source: int | None = None
    """With ``merge="pick"``: the position whose weights serve all; it may be one outside of the group."""
    rank: int = Field(0, ge=0)
    side: Literal["input", "output", "both"] = "input"
    fit: Literal["svd", "geopair"] = "svd"
    """How a basis on the input side is found: one SVD in a common metric, or alternating, each position in its own."""

    diagonal: bool = False
    """With ``method="tie"`` and a rank: the private correction also has a diagonal (ResidualTransformer)."""

    kv: bool = False
    """Keys and values are computed once, at the first position, and read by the others (cross-layer attention)."""

    atoms: int = Field(0, ge=0)
    """With ``method="atoms"``: how many matrices are stored."""

    pivots: bool = False
    """With ``method="basis"`` of one position: the factor on the input side holds an identity, which is not stored: the
    same product in ``rank``² fewer numbers (PIFA: Zhao et al., 2025, 2501.19090)."""

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if not self.positions:
            raise ValueError("a group needs at least one position")
        if not self.parts:
            raise ValueError(f"the group of positions {list(self.positions)} names no parts")
        if (self.merge == "pick") != (self.source is not None):
            raise ValueError("merge = 'pick' and source = (a position) go together")
        if self.source is not None and self.source < 0:
            raise ValueError(f"positions count from 0, given: {self.source}")
        if self.diagonal and (self.method != "tie" or self.rank == 0):
            raise ValueError("diagonal = true is for method = 'tie' with a rank")
        if self.fit == "geopair" and (self.method, self.side) != ("basis", "input"):
            raise ValueError("fit = 'geopair' is for method = 'basis' with side = 'input'")
        if self.kv and (self.method != "tie" or len(self.positions) < 2):
            raise ValueError("kv = true is for method = 'tie' over several positions")
        if self.method == "basis" and self.rank == 0:
            raise ValueError(f"the basis over positions {list(self.positions)} needs a rank of at least 1")
        if (self.method == "atoms") != (self.atoms > 0):
            raise ValueError("method = 'atoms' and atoms = (a number) go together")
        if self.pivots and (self.method != "basis" or len(self.positions) > 1):
            raise ValueError("pivots = true is for method = 'basis' with one position")
        if self.method == "atoms" and (self.rank or self.merge != "mean"):
            raise ValueError("method = 'atoms' takes no rank and no merge")
        return self


class Gate(Config):
    """A private scalar g at a position: its output becomes ``h + g * (layer(h) - h)``; g = 0 skips it exactly."""

    position: int = Field(ge=0)
    value: float = Field(1.0, allow_inf_nan=False)


class StackPlan(Config):
    """What happens to one stack. ``length`` and all positions count the layers of the original model."""

    name: str
    length: int = Field(ge=1)
    groups: tuple[Group, ...] = ()
    gates: tuple[Gate, ...] = ()
    drop: Positions = ()

    @property
    def kept(self) -> tuple[int, ...]:
        """The positions that are not dropped, in order."""
        return tuple(position for position in range(self.length) if position not in self.drop)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        gated = [gate.position for gate in self.gates]
        sources = [group.source for group in self.groups if group.source is not None]
        used = [*self.drop, *gated, *sources, *(p for group in self.groups for p in group.positions)]
        if beyond := [position for position in used if position >= self.length]:
            raise ValueError(f"stack {self.name!r} has positions 0 to {self.length - 1}, given: {beyond[0]}")
        if both := [position for position in self.drop if position in used[len(self.drop) :]]:
            raise ValueError(f"position {both[0]} of stack {self.name!r} is dropped and used at once")
        if len(self.drop) == self.length:
            raise ValueError(f"all positions of stack {self.name!r} are dropped")
        if len(set(gated)) < len(gated):
            raise ValueError(f"a position of stack {self.name!r} has two gates: {sorted(gated)}")
        claims = Counter(
            (p, part) for group in self.groups for p in group.positions for part in dict.fromkeys(group.parts)
        )
        for position, part in (claim for claim, times in claims.items() if times > 1):
            raise ValueError(f"position {position} of stack {self.name!r} has {part!r} in two groups")
        return self


class Table(Config):
    """An embedding table V x H stored as two factors, V x ``rank`` and ``rank`` x H, for all its uses."""

    name: str
    """The embedding module; an output head that uses the same table goes with it."""
    rank: int = Field(ge=1)


class SharingPlan(Config):
    """The whole plan. Equal plans compare equal; ``print(plan)`` draws it."""

    version: int = Field(FORMAT_VERSION, ge=1)
    stacks: tuple[StackPlan, ...] = ()
    tables: tuple[Table, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _readable(cls, values: Any) -> Any:
        version = values.get("version") if isinstance(values, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:  # before its new keys are called unknown
            raise ValueError(
                f"the plan has format version {version}, this layershare reads up to {FORMAT_VERSION}: upgrade it",
            )
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [stack.name for stack in self.stacks]
        if len(set(names)) < len(names):
            raise ValueError(f"a stack is planned twice: {names}")
        tables = [table.name for table in self.tables]
        if len(set(tables)) < len(tables):
            raise ValueError(f"a table is planned twice: {tables}")
        return self

    @property
    def uses_activations(self) -> bool:
        """Whether calibration would change what is shared."""
        groups = [group for stack in self.stacks for group in stack.groups]
        return bool(self.tables) or any(
            group.rank or group.atoms or group.merge == "regmean" for group in groups
        )

    def to_dict(self) -> dict:
        """Plain data, defaults left out so that the text stays readable."""
        return {
            "version": self.version,
            **self.model_dump(mode="json", exclude_defaults=True, exclude={"version"}),
        }

    @classmethod
    def from_dict(cls, values: dict, where: str = "plan") -> Self:
        """Raises PlanError naming the key and the nearest valid one."""
        return cls.parse(values, where=where, error=PlanError)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> Self:
        try:
            return cls.from_dict(json.loads(text), where)
        except json.JSONDecodeError as error:
            raise PlanError(f"{where}: not JSON: {error}.") from None

    def to_toml(self) -> str:
        import tomli_w

        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_toml(cls, text: str, where: str = "plan") -> Self:
        try:
            return cls.from_dict(tomllib.loads(text), where)
        except tomllib.TOMLDecodeError as error:
            raise PlanError(f"{where}: not TOML: {error}.") from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a ``.toml`` or ``.json`` plan. Raises PlanError naming the file."""
        path = _file(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(
                f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})."
            ) from None
        return cls.from_toml(text, str(path)) if path.suffix == ".toml" else cls.from_json(text, str(path))

    def save(self, path: str | Path) -> None:
        """Write a ``.toml`` or ``.json`` plan, whole or not at all. Raises PlanError naming the file."""
        path = _file(path)
        if not path.parent.is_dir():
            raise PlanError(f"{path}: cannot be written (there is no folder {path.parent}).")
        try:
            write_atomic(path, self.to_json() if path.suffix == ".json" else self.to_toml())
        except OSError as error:
            raise PlanError(f"{path}: cannot be written ({error.strerror or error}).") from None

    def __str__(self) -> str:
        return self.picture()

    def picture(self) -> str:
        """A text picture: a column a position, a row a part; equal letters share, ``.`` is private, ``x`` dropped.

        A small letter is a shared basis, or shared atoms; below stands what each letter means.
        """
        tables = [f"{table.name}: in two factors of rank {table.rank}" for table in self.tables]
        if not tables and not any(stack.groups or stack.drop or stack.gates for stack in self.stacks):
            return "nothing is shared"
        return "\n\n".join([*(_draw(stack) for stack in self.stacks), *tables])


def _file(path: str | Path) -> Path:
    if (path := Path(path)).suffix not in (".toml", ".json"):
        raise PlanError(f"{path}: a plan is a .toml or .json file.")
    return path


def _draw(stack: StackPlan) -> str:
    rows: dict[str, list[str]] = {}
    legend: dict[str, str] = {}
    width = max(len(str(stack.length - 1)), 1)
    for number, group in enumerate(stack.groups):
        letter = _letter(number, group.method)
        for part in group.parts:
            row = rows.setdefault(part, ["x" if p in stack.drop else "." for p in range(stack.length)])
            for position in group.positions:
                row[position] = letter
        legend[letter] = describe(group)
    rows = rows or {"layer": ["x" if p in stack.drop else "." for p in range(stack.length)]}
    if stack.gates:
        values = {gate.position: f"{gate.value:g}" for gate in stack.gates}
        rows["gate"] = [values.get(position, "") for position in range(stack.length)]
    width = max(width, *(len(cell) for row in rows.values() for cell in row))
    margin = max(map(len, (stack.name, *rows)))
    lines = [f"{stack.name:<{margin}}  " + " ".join(f"{p:>{width}}" for p in range(stack.length))]
    lines += [
        f"{part:<{margin}}  " + " ".join(f"{cell:>{width}}" for cell in row) for part, row in rows.items()
    ]
    return "\n".join(lines + [f"{'':<{margin}}  {letter}: {text}" for letter, text in legend.items()])


def _letter(number: int, method: str) -> str:
    letter = ascii_uppercase[number % 26] + (str(number // 26) if number >= 26 else "")
    return letter if method == "tie" else letter.lower()


def describe(group: Group) -> str:
    """The group in words: ``tie (mean) + private rank 8`` or ``basis of rank 96, input side``."""
    merge = f"from {group.source}" if group.merge == "pick" else group.merge
    if group.method == "basis":
        if len(group.positions) == 1:
            return f"low-rank factors of rank {group.rank}{', pivoted' * group.pivots}"
        if group.side == "both":
            return f"tied ({merge}), low-rank factors of rank {group.rank}"
        how = ", each in its own metric" if group.fit == "geopair" else ""
        return f"shared basis of rank {group.rank}, {group.side} side{how}"
    if group.method == "atoms":
        return f"mixed of {group.atoms} shared matrices"
    if len(group.positions) == 1:
        return "private"
    private = f" + private rank {group.rank}{' + diagonal' * group.diagonal}" if group.rank else ""
    return f"tied ({merge}){private}" + f", keys and values of {group.positions[0]}" * group.kv
