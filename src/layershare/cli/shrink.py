"""Verbs that make a model smaller: plan, share, prune, and whole runs: compress, demo, run."""

from typing import Any

from layershare import options as opt
from layershare.cli.answer import Shown, account, columns, note, saved, task_of, values, words
from layershare.cli.planning import drawn, refuse, searched


def plan(
    model: opt.Model, *, plan: opt.PlanFile = None, preset: opt.Preset = "adjacent",
    unique: opt.Unique = None, budget: opt.PlanBudget = None, parts: opt.Parts = None,
    stack: opt.StackName = None, merge: opt.Merge = "mean", rank: opt.Rank = 0, kv: opt.KeysValues = False,
    out: opt.PlanOut = None,
    data: opt.SearchData = None, task: opt.MaybeTask = None, validation: opt.Validation = None,
    column: opt.Column = None, trials: opt.Trials = 64, jobs: opt.Jobs = 1, storage: opt.Storage = None,
    seed: opt.Seed = 0, task_set: opt.TaskSet = None, skip_bad: opt.SkipBad = False,
) -> Shown:  # fmt: skip
    """Show what would be shared, and what that stores. With --data: search the plan that changes the answers least."""
    if data:
        chosen = {"preset": preset != "adjacent", "merge": merge != "mean"}
        refuse(plan=plan, unique=unique, parts=parts, stack=stack, rank=rank, kv=kv, **chosen)
        return searched(
            model, out, budget, data, task=task, task_settings=values(task_set, "--task-set"), validation=validation,
            columns=columns(column), skip_bad=skip_bad, seed=seed, trials=trials, jobs=jobs, storage=storage,
        )  # fmt: skip
    from layershare.sharing.folder import plan_for
    from layershare.stacks import find_stacks
    from layershare.store.open import sketch

    stacks, names = find_stacks(sketch(model)), words(parts)
    how: dict[str, Any] = dict(
        preset=preset, unique=unique, budget=budget, parts=names, stack=stack, merge=merge, rank=rank, kv=kv
    )
    return drawn(stacks, plan_for(stacks, plan, **how), out)


def share(
    model: opt.Model, *, out: opt.Out, plan: opt.PlanFile = None, preset: opt.Preset = "adjacent",
    unique: opt.Unique = None, budget: opt.MaybeBudget = None, parts: opt.Parts = None,
    stack: opt.StackName = None, merge: opt.Merge = "mean", rank: opt.Rank = 0, kv: opt.KeysValues = False,
    calibration: opt.Calibration = None, task: opt.MaybeTask = None, fit: opt.Fit = None,
    samples: opt.Samples = None, stream: opt.Stream = False,
) -> Shown:  # fmt: skip
    """Share a model by a plan or a preset. Saves it as it is, without healing."""
    from layershare import plan_of
    from layershare.sharing.folder import share_folder

    student = share_folder(
        model, out, plan=plan, calibration=calibration or (), task=task, preset=preset,
        unique=unique, budget=budget, parts=words(parts), stack=stack, merge=merge, rank=rank, kv=kv, stream=stream,
        fit=fit, samples=samples,
    )  # fmt: skip
    if plan_of(student) is None:  # positions were dropped, no more
        text = f"An ordinary model, {student.num_parameters():,} parameters: nothing is tied.\nSaved in {out}"
        return Shown(text, {"folder": str(out), "plan": None, "account": None})
    return account(student, out)


def prune(
    model: opt.Model, *, what: opt.PruneWhat, out: opt.Out, amount: opt.Amount = None, by: opt.PruneBy = "magnitude",
    pattern: opt.Pattern = None, threshold: opt.Threshold = None, keep_shape: opt.KeepShape = False,
    task: opt.MaybeTask = None, data: opt.PruneData = None, column: opt.Column = None, teacher: opt.Guide = None,
    settings: opt.PruneSet = None, task_set: opt.TaskSet = None, skip_bad: opt.SkipBad = False,
) -> Shown:  # fmt: skip
    """Cut positions, heads, neurons or single weights. Shared weights are cut once and stay shared."""
    from layershare.prune.config import PruneConfig
    from layershare.prune.folder import prune_folder

    amount = amount if amount is None or amount % 1 else int(amount)
    given = {"amount": amount, "pattern": pattern, "threshold": threshold, "keep_shape": keep_shape}
    config = PruneConfig.parse({"what": what, "by": by} | given | values(settings, "--set"))
    names, kind = columns(column), task_of(task, task_set, skip_bad) if task else None
    cut = prune_folder(model, config, out, task=kind, data=data or (), teacher=teacher, columns=names)
    return Shown(f"{cut}\nSaved in {out}", {"out": str(out), "account": cut.to_dict()})


def compress(
    model: opt.Model, *, task: opt.Task, data: opt.Data, out: opt.Out, test: opt.Test = None,
    validation: opt.Validation = None, column: opt.Column = None, budget: opt.RunBudget = None,
    plan: opt.PlanFile = None, scheme: opt.Scheme = "auto", unique: opt.Kept = None, baseline: opt.Baseline = None,
    steps: opt.Steps = None, seed: opt.Seed = 0, overwrite: opt.Overwrite = False, task_set: opt.TaskSet = None,
    skip_bad: opt.SkipBad = False,
) -> Shown:  # fmt: skip
    """Share, heal, measure and save a model in one go. Run again, it goes on where it stopped."""
    from layershare.compress import compress

    result = compress(
        model, task=task_of(task, task_set, skip_bad), data=data, test=test, validation=validation, out=out,
        budget=budget, plan=plan, scheme=scheme, unique=unique, baseline=baseline,
        steps=steps, seed=seed, columns=columns(column), overwrite=overwrite,
    )  # fmt: skip
    return Shown(f"{result.table()}\n\n{saved(out)}", result.model_dump(mode="json"))


def demo(
    *, budget: opt.Budget = 0.5, baseline: opt.Baseline = None, out: opt.DemoOut = None,
    steps: opt.Steps = None, seed: opt.Seed = 0, overwrite: opt.Overwrite = False,
) -> Shown:  # fmt: skip
    """Compress the packaged all-MiniLM-L6-v2. Heals and judges it on STS-B, and says whether it reaches the bar."""
    from layershare.demo import demo, folder_for, verdict

    out = out or folder_for(budget, seed)
    result = demo(out, budget=budget, baseline=baseline, steps=steps, seed=seed, overwrite=overwrite)
    text = f"{result.table()}\n\n{verdict(result, budget)}\n\n{saved(out)}"
    return Shown(text, result.model_dump(mode="json"))


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
    done = plan(loaded, out) if dry_run else run(loaded, out, progress=note)
    return Shown(str(done), done.to_dict())
