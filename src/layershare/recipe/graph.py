"""The recipe as written: read, checked, and in the order in which its stages can be made."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from layershare.config import Config
from layershare.errors import OptionError, nearest
from layershare.recipe.verbs import VERBS, AdaptStage, PretrainStage, Source, Stage, may_make, needs_data

PACKAGE = "package:"
ARTICLE = {"adapter": "an", "report": "a"}


class Written(Config):
    """The top of the file."""

    name: str = Field(pattern=r"^[\w.-]+$")
    out: str | None = Field(None, description="The folder of the run; default out/NAME.")
    seed: int = Field(0, ge=0, lt=2**31, description="Of every stage that names no other.")
    data: Source | None = None
    stages: dict[str, dict[str, Any]] = Field(min_length=1)


class Recipe(Config):
    """A recipe that is right in itself: every name is known, and the stages are in an order that can be run."""

    name: str
    out: str
    seed: int
    data: Source | None
    stages: dict[str, Any]

    def uses(self, name: str) -> dict[str, str]:
        """Field (of ``models``: the name itself) -> stage or model that the stage ``name`` takes."""
        return references(self.stages[name])

    def source(self, name: str) -> Source | None:
        """The data of a stage: its own, or the recipe's."""
        found: Source | None = self.stages[name].data or self.data
        return found


def load(path: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe; ``settings`` are ``STAGE.KEY=VALUE`` (or ``KEY=VALUE`` at the top), in place of what is written.

    Raises OptionError for a file that is not there or no YAML, a key, verb or stage that does not exist (naming the
    nearest), a wrong value, and stages that need each other.
    """
    path = Path(path).expanduser()
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise OptionError(f"{path}: cannot be read ({why}).", "A recipe is a YAML file.") from None
    except yaml.YAMLError as error:
        raise OptionError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise OptionError(f"{path} is no recipe.", "It needs name and stages.")
    for setting in settings:
        _set(values, setting)
    return parse(values, str(path))


def parse(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """The recipe of a dict, see :func:`load`."""
    written = Written.parse(values, where=where)
    stages = {
        name: _stage(name, own, written.seed, f"{where}: stage {name}")
        for name, own in written.stages.items()
    }
    for name, stage in stages.items():
        _check(name, stage, stages, written, where)
    return Recipe(
        name=written.name,
        out=written.out or f"out/{written.name}",
        seed=written.seed,
        data=written.data,
        stages={name: stages[name] for name in _order(stages, where)},
    )


def references(stage: Stage) -> dict[str, str]:
    """Field (of ``models``: the name itself) -> stage or model that ``stage`` takes."""
    found: dict[str, str] = {}
    for field in stage.REFERENCES:
        value = getattr(stage, field)
        if isinstance(value, str):
            found[field] = value
        elif value is not None:
            found |= {name: name for name in value}
    return found


def _stage(name: str, values: dict[str, Any], seed: int, where: str) -> Stage:
    if not name.replace("-", "_").isidentifier():
        raise OptionError(f"{where}: a stage's name is its folder: letters, digits, _ and -.")
    if "verb" not in values:
        raise OptionError(f"{where} has no verb.", f"Valid: {', '.join(VERBS)}.")
    if (verb := values["verb"]) not in VERBS:
        raise OptionError(f"{where}: there is no verb {verb!r}.", nearest(str(verb), VERBS))
    kind = VERBS[verb]
    values = ({"seed": seed} if "seed" in kind.model_fields else {}) | values
    if kind is AdaptStage and isinstance(adapter := values.get("adapter", {}), dict):
        values = values | {"adapter": {"seed": values["seed"]} | adapter}
    return kind.parse(values, where=where)


def _check(name: str, stage: Stage, stages: Mapping[str, Stage], written: Written, where: str) -> None:
    data = stage.data or written.data
    if needs_data(stage) and data is None:
        raise OptionError(f"{where}: stage {name} needs data.", "Give it, or the recipe, data with files.")
    own = getattr(stage, "seed", written.seed)
    split = data is not None and data.package is None and data.test is None
    if split and own != written.seed and not isinstance(stage, PretrainStage):
        raise OptionError(
            f"{where}: stage {name} has the seed {own}, the recipe {written.seed}: they would hold out other texts.",
            "Give data a test file, or set the seed of the recipe.",
        )
    for field, wanted in references(stage).items():
        if wanted in stages:
            makes = stages[wanted].MAKES
            if makes != "model" and not (makes == "adapter" and stage.MAKES == "report"):
                raise OptionError(
                    f"{where}: stage {name}: {wanted} makes {ARTICLE[makes]} {makes}, and {stage.verb} needs a model."
                )
            continue
        fresh = may_make(stage) and field == "model"  # may name a model type
        if not (fresh or wanted.startswith(PACKAGE) or "/" in wanted or Path(wanted).is_dir()):
            raise OptionError(
                f"{where}: stage {name}: there is no stage and no folder {wanted!r}.",
                f"{nearest(wanted, [other for other in stages if other != name])} (Hub names are OWNER/NAME.)",
            )


def _order(stages: Mapping[str, Stage], where: str) -> list[str]:
    """Each stage behind those it needs, else as written."""
    done: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = " -> ".join([*path[path.index(name) :], name])
            raise OptionError(f"{where}: these stages need each other: {circle}.")
        if name in done:
            return
        for wanted in references(stages[name]).values():
            if wanted in stages:
                visit(wanted, (*path, name))
        done.append(name)

    for name in stages:
        visit(name, ())
    return done


def _set(values: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    *path, last = key.split(".")
    if not (equals and all([*path, last])):
        raise OptionError(f"--set {setting} is not of the form STAGE.KEY=VALUE.")
    at: Any = values
    stages = values.get("stages")
    if path and isinstance(stages, dict) and path[0] not in values:
        if path[0] not in stages:
            raise OptionError(f"--set {setting}: there is no stage {path[0]!r}.", nearest(path[0], stages))
        at = stages
    for step in path:
        at = at.setdefault(step, {})
        if not isinstance(at, dict):
            raise OptionError(f"--set {setting}: {step} has no keys.")
    try:
        at[last] = json.loads(text)
    except ValueError:
        at[last] = text
