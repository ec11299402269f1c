"""Verbs that train: pretrain, finetune, distill, adapt."""

from layershare import options as opt
from layershare.cli.answer import Shown, columns, values


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
        model, data, out, validation=validation, tokenizer=tokenizer, columns=columns(column), resume=not anew,
        overrides=values(size, "--size"), plan=from_the_start(plan, preset, unique, budget),
        config=PretrainConfig.parse(own | values(settings, "--set")),
    )  # fmt: skip
    return Shown(f"{result.table()}\n\nSaved in {out}", result.model_dump(mode="json"))


def finetune(
    model: opt.Model, *, data: opt.Data, out: opt.Out, task: opt.Task = "text-classification", test: opt.Test = None,
    validation: opt.Validation = None, column: opt.Column = None, new_head: opt.NewHead = False,
    steps: opt.TrainSteps = None, seed: opt.Seed = 0, settings: opt.Set = None, anew: opt.Anew = False,
) -> Shown:  # fmt: skip
    """Train a model on labelled data, stop early, keep the best. Run again, it goes on where it stopped."""
    from layershare.finetune import FinetuneConfig, finetune

    own = {"seed": seed} | ({"steps": steps} if steps else {})
    result = finetune(
        model, data, out, task=task, validation=validation, test=test, columns=columns(column), new_head=new_head,
        config=FinetuneConfig.parse(own | values(settings, "--set")), resume=not anew,
    )  # fmt: skip
    return Shown(f"{result.table()}\n\nSaved in {out}", result.model_dump(mode="json"))


def distill(
    student: opt.Model, *, teacher: opt.Teacher, task: opt.Task, data: opt.Data, out: opt.Out,
    column: opt.Column = None, steps: opt.Steps = None, seed: opt.Seed = 0,
    cache: opt.TeacherCache = None,
) -> Shown:  # fmt: skip
    """Train a shared model to do what the original does. Run again, it goes on where it stopped."""
    from layershare.heal.distill import DistillConfig
    from layershare.heal.folder import heal_folder

    config = DistillConfig.parse({"seed": seed} | ({} if steps is None else {"steps": steps}))
    names = columns(column)
    history = heal_folder(student, teacher, task, data, out, columns=names, config=config, cache=cache)
    return Shown(f"{history[-1]}\nSaved in {out}", {"out": str(out), "history": history})


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
    names = columns(column)
    history = adapt_folder(
        model, task, data, out, config=config, training=training, teacher=teacher, columns=names
    )
    return Shown(f"{history[-1]}\nSaved in {out}", {"out": str(out), "history": history})
