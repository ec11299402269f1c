"""The command line. Every verb takes its options, calls a function and returns what to show; the rest is here once.

Nothing heavy is imported before a verb runs, so that ``--help`` answers at once.
"""

import contextlib
import functools
import inspect
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import typer

from layershare import __version__
from layershare import options as opt
from layershare.errors import LayershareError, OptionError

app = typer.Typer(
    help="Share parameters across the layers of a pretrained Transformer, heal what that cost, prove what is left.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Shown(NamedTuple):
    """What a verb answers: ``text`` for people, ``data`` for ``--json``."""

    text: str
    data: Any


def verb(function: Callable[..., Shown]) -> Callable[..., Shown]:
    """Make ``function`` a command, with ``--json`` and ``--debug``, printing its answer, or its error in one line."""

    @functools.wraps(function)
    def command(*, as_json: bool, debug: bool, **options: Any) -> None:
        logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(name)s: %(message)s")
        if not debug:  # it tells every try to reach the hub, twice
            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # libraries may print, stdout is for the answer
                shown = function(**options)
        except LayershareError as error:
            if debug:
                traceback.print_exc()
            _note(f"layershare: error: {' '.join(str(error).split())}")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            _note("layershare: interrupted. Run the same command again to go on: what is finished is kept.")
            raise typer.Exit(130) from None
        typer.echo(json.dumps(shown.data, indent=2) if as_json else shown.text)

    common = [
        inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=opt.Json),
        inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=opt.Debug),
    ]
    signature = inspect.signature(function)
    parameters = [*signature.parameters.values(), *common]
    # typer reads the options off the signature
    vars(command)["__signature__"] = signature.replace(parameters=parameters)
    command.__annotations__ = {**function.__annotations__, "as_json": opt.Json, "debug": opt.Debug}
    app.command(function.__name__)(command)
    return function


@verb
def pretrain(
    model: opt.Start, *, data: opt.Texts, out: opt.Out, validation: opt.Validation = None, column: opt.Column = None,
    tokenizer: opt.Tokenizer = None, objective: opt.Objective = "auto", block_size: opt.BlockSize = 128,
    size: opt.Size = None, plan: opt.PlanFile = None, preset: opt.Preset = "adjacent", unique: opt.Unique = None,
    budget: opt.MaybeBudget = None, steps: opt.TrainSteps = None, seed: opt.Seed = 0, settings: opt.Set = None,
    anew: opt.Anew = False,
) -> Shown:  # fmt: skip
    """Train a language model on running text, shared from the start or not. Run again, it goes on where it stopped."""
    from layershare.pretrain import PretrainConfig, pretrain
    from layershare.sharing.folder import from_the_start

    own = {"objective": objective, "block_size": block_size, "seed": seed} | (
        {"steps": steps} if steps else {}
    )
    result = pretrain(
        model, data, out, validation=validation, tokenizer=tokenizer, columns=_columns(column), resume=not anew,
        overrides=_values(size, "--size"), plan=from_the_start(plan, preset, unique, budget),
        config=PretrainConfig.parse(own | _values(settings, "--set")),
    )  # fmt: skip
    return Shown(f"{result.table()}\n\nSaved in {out}", result.model_dump(mode="json"))


@verb
def finetune(
    model: opt.Model, *, data: opt.Data, out: opt.Out, task: opt.Task = "text-classification", test: opt.Test = None,
    validation: opt.Validation = None, column: opt.Column = None, new_head: opt.NewHead = False,
    steps: opt.TrainSteps = None, seed: opt.Seed = 0, settings: opt.Set = None, anew: opt.Anew = False,
) -> Shown:  # fmt: skip
    """Train a model on labelled data, stop early, keep the best. Run again, it goes on where it stopped."""
    from layershare.finetune import FinetuneConfig, finetune

    own = {"seed": seed} | ({"steps": steps} if steps else {})
    result = finetune(
        model, data, out, task=task, validation=validation, test=test, columns=_columns(column), new_head=new_head,
        config=FinetuneConfig.parse(own | _values(settings, "--set")), resume=not anew,
    )  # fmt: skip
    return Shown(f"{result.table()}\n\nSaved in {out}", result.model_dump(mode="json"))


@verb
def compress(
    model: opt.Model, *, task: opt.Task, data: opt.Data, out: opt.Out, test: opt.Test = None,
    validation: opt.Validation = None, column: opt.Column = None, budget: opt.Budget = 0.5,
    plan: opt.PlanFile = None, scheme: opt.Scheme = "auto", baseline: opt.Baseline = None,
    steps: opt.Steps = None, seed: opt.Seed = 0, overwrite: opt.Overwrite = False,
) -> Shown:  # fmt: skip
    """Share, heal, measure and save a model in one go. Run again, it goes on where it stopped."""
    from layershare.compress import compress

    result = compress(
        model, task=task, data=data, test=test, validation=validation, out=out, budget=budget, plan=plan, scheme=scheme,
        baseline=baseline, steps=steps, seed=seed, columns=_columns(column), overwrite=overwrite,
    )  # fmt: skip
    return Shown(f"{result.table()}\n\n{_saved(out)}", result.model_dump(mode="json"))


@verb
def plan(
    model: opt.Model, *, plan: opt.PlanFile = None, preset: opt.Preset = "adjacent",
    unique: opt.Unique = None, budget: opt.MaybeBudget = None, parts: opt.Parts = None,
    stack: opt.StackName = None, merge: opt.Merge = "mean", rank: opt.Rank = 0, out: opt.PlanOut = None,
) -> Shown:  # fmt: skip
    """Show what would be shared, and what that stores. No weight is read."""
    from layershare import find_stacks, predict
    from layershare.sharing.folder import plan_for
    from layershare.store.open import sketch

    stacks = find_stacks(sketch(model))
    made = plan_for(
        stacks, plan, preset=preset, unique=unique, budget=budget, parts=_words(parts), stack=stack, merge=merge,
        rank=rank,
    )  # fmt: skip
    cost = predict(stacks, made)
    if out is not None:
        made.save(out)
    data = {"plan": made.to_dict(), "predicted": asdict(cost) | {"ratio": cost.ratio}}
    return Shown("\n".join([*map(str, stacks), "", made.picture(), "", _price(cost)]), data)


@verb
def share(
    model: opt.Model, *, out: opt.Out, plan: opt.PlanFile = None, preset: opt.Preset = "adjacent",
    unique: opt.Unique = None, budget: opt.MaybeBudget = None, parts: opt.Parts = None,
    stack: opt.StackName = None, merge: opt.Merge = "mean", rank: opt.Rank = 0,
    calibration: opt.Calibration = None, task: opt.MaybeTask = None,
) -> Shown:  # fmt: skip
    """Share a model by a plan or a preset. Saves it as it is, without healing."""
    from layershare.sharing.folder import share_folder

    student = share_folder(
        model, out, plan=plan, calibration=[] if calibration is None else [calibration], task=task, preset=preset,
        unique=unique, budget=budget, parts=_words(parts), stack=stack, merge=merge, rank=rank,
    )  # fmt: skip
    return _account(student, out)


@verb
def distill(
    student: opt.Model, *, teacher: opt.Teacher, task: opt.Task, data: opt.Data, out: opt.Out,
    column: opt.Column = None, steps: opt.Steps = None, seed: opt.Seed = 0,
    cache: opt.TeacherCache = None,
) -> Shown:  # fmt: skip
    """Train a shared model to do what the original does. Run again, it goes on where it stopped."""
    from layershare.heal.distill import DistillConfig
    from layershare.heal.folder import heal_folder

    config = DistillConfig.parse({"seed": seed} | ({} if steps is None else {"steps": steps}))
    columns = _columns(column)
    history = heal_folder(student, teacher, task, data, out, columns=columns, config=config, cache=cache)
    return Shown(f"{history[-1]}\nSaved in {out}", {"out": str(out), "history": history})


@verb
def adapt(
    model: opt.Model, *, task: opt.Task, data: opt.Data, out: opt.Out, method: opt.Method = "lora",
    per_group: opt.PerGroup = False, teacher: opt.MaybeTeacher = None, column: opt.Column = None,
    steps: opt.Steps = None, seed: opt.Seed = 0,
) -> Shown:  # fmt: skip
    """Train small modules on a frozen model, shared or not. Saves a PEFT adapter folder."""
    from layershare.adapt.folder import AdaptConfig, MatchConfig, adapt_folder

    share = "group" if per_group else "position"
    config = AdaptConfig.parse({"method": method, "share": share, "seed": seed})
    training = MatchConfig.parse({"seed": seed} | ({} if steps is None else {"steps": steps}))
    names = _columns(column)
    history = adapt_folder(
        model, task, data, out, config=config, training=training, teacher=teacher, columns=names
    )
    return Shown(f"{history[-1]}\nSaved in {out}", {"out": str(out), "history": history})


@verb
def prune(
    model: opt.Model, *, what: opt.PruneWhat, out: opt.Out, amount: opt.Amount = None, by: opt.PruneBy = "magnitude",
    pattern: opt.Pattern = None, threshold: opt.Threshold = None, keep_shape: opt.KeepShape = False,
    task: opt.MaybeTask = None, data: opt.PruneData = None, column: opt.Column = None, teacher: opt.Guide = None,
) -> Shown:  # fmt: skip
    """Cut positions, heads, neurons or single weights. Shared weights are cut once and stay shared."""
    from layershare.prune.config import PruneConfig
    from layershare.prune.folder import prune_folder

    amount = amount if amount is None or amount % 1 else int(amount)
    given = {"amount": amount, "pattern": pattern, "threshold": threshold, "keep_shape": keep_shape}
    config = PruneConfig.parse({"what": what, "by": by} | given)
    roles = _columns(column)
    account = prune_folder(model, config, out, task=task, data=data or (), teacher=teacher, columns=roles)
    return Shown(f"{account}\nSaved in {out}", {"out": str(out), "account": account.to_dict()})


@verb
def evaluate(models: opt.Models, *, task: opt.Task, data: opt.Data, column: opt.Column = None) -> Shown:
    """Measure models side by side. Quality, parameters, bytes, memory and latency, on the same data."""
    from layershare.measure.evaluate import evaluate

    result = evaluate(models, task, data, columns=_columns(column), progress=_note)
    return Shown(result.table(), result.model_dump(mode="json"))


@verb
def run(
    recipe: opt.RecipeFile,
    *,
    out: opt.RecipeOut = None,
    settings: opt.SetStage = None,
    dry_run: opt.DryRun = False,
) -> Shown:
    """Run the stages of a recipe. Run again, it skips what is finished and goes on where it stopped."""
    from layershare.recipe import load, plan, run

    loaded = load(recipe, settings=settings or ())
    done = plan(loaded, out) if dry_run else run(loaded, out, progress=_note)
    return Shown(str(done), done.to_dict())


@verb
def verify(folder: opt.Folder) -> Shown:
    """Load a shared model and prove that its ties hold."""
    from layershare.store.open import load_model

    return _account(load_model(folder), folder)


@verb
def report(folder: opt.Folder) -> Shown:
    """Write report.html and README.md anew. They are made from the result.json of the folder."""
    from layershare.report import write

    written = [str(file) for file in write(folder)]
    return Shown("\n".join(written), {"written": written})


@verb
def architectures(*, out: opt.PageOut = None, laws: opt.Laws = None) -> Shown:
    """Find the stacks of every model type that the installed transformers knows. Takes minutes, reads no weights."""
    from layershare.architectures import table, write

    made = table(laws=laws, progress=_note)
    if out is not None:
        write(out, made)
    return Shown(made.text(), made.to_dict())


@verb
def demo(
    *, budget: opt.Budget = 0.5, baseline: opt.Baseline = None, out: opt.DemoOut = None,
    steps: opt.Steps = None, seed: opt.Seed = 0, overwrite: opt.Overwrite = False,
) -> Shown:  # fmt: skip
    """Compress the packaged all-MiniLM-L6-v2. Heals and judges it on STS-B, and says whether it reaches the bar."""
    from layershare.demo import demo, folder_for, verdict

    out = out or folder_for(budget, seed)
    result = demo(out, budget=budget, baseline=baseline, steps=steps, seed=seed, overwrite=overwrite)
    text = f"{result.table()}\n\n{verdict(result, budget)}\n\n{_saved(out)}"
    return Shown(text, result.model_dump(mode="json"))


def _words(parts: str | None) -> list[str] | None:
    return parts.split(",") if parts else None


def _account(student: Any, folder: Path) -> Shown:
    """Verify a shared model, and tell what is tied."""
    from layershare import plan_of, verify

    account, plan = verify(student), plan_of(student)
    assert plan is not None  # or verify would have said so
    data = {"folder": str(folder), "plan": plan.to_dict(), "account": asdict(account)}
    return Shown(f"{plan.picture()}\n\n{account}", data)


def _saved(out: Path) -> str:
    return f"Saved in {out}; the report is {out / 'report.html'}"


def _price(cost: Any) -> str:
    return (
        f"stores {cost.layer_unique:,} of {cost.layer_effective:,} layer parameters ({cost.ratio:.1%}), "
        f"{cost.layer_bytes / 1e6:,.1f} of {cost.layer_bytes_before / 1e6:,.1f} MB"
    )


def _columns(pairs: list[str] | None) -> dict[str, str] | None:
    """``["text=review"]`` -> ``{"text": "review"}``."""
    for pair in pairs or ():
        if "=" not in pair:
            raise OptionError(
                f"--column {pair} is not of the form ROLE=NAME.", "For example: --column text=review"
            )
    return dict(pair.split("=", 1) for pair in pairs) if pairs else None


def _values(pairs: list[str] | None, option: str) -> dict[str, Any]:
    """``["hidden_size=64"]`` -> ``{"hidden_size": 64}``; what is not JSON is a text."""
    found: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise OptionError(f"{option} {pair} is not of the form KEY=VALUE.")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _note(text: str) -> None:
    typer.echo(text, err=True)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context, version: opt.Version = False) -> None:
    if version:
        typer.echo(f"layershare {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars are for terminals
    command = typer.main.get_command(app)
    try:
        return command.main(arguments, prog_name="layershare", standalone_mode=False) or 0
    except typer.TyperException as error:  # an option that is missing, misspelt or of the wrong kind
        _note(f"layershare: error: {error.format_message()}")
        return 2
