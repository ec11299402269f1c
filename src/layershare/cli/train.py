"""Verbs that train: pretrain, finetune, distill, adapt."""

from layershare import options as opt
from layershare.cli.answer import Shown, columns, files, made, part, task_of, values


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
        {} if steps is None else {"steps": steps}
    )
    result = pretrain(
        model, data, out, validation=validation, tokenizer=tokenizer, columns=columns(column), resume=not anew,
        overrides=values(size, "--size"), plan=from_the_start(plan, preset, unique, budget),
        config=PretrainConfig.parse(own | values(settings, "--set")),
    )  # fmt: skip
    return made(result, out)


def finetune(
    model: opt.Model, *, data: opt.Data, out: opt.Out, task: opt.Task = "text-classification", test: opt.Test = None,
    validation: opt.Validation = None, column: opt.Column = None, new_head: opt.NewHead = False,
    size: opt.Size = None, steps: opt.TrainSteps = None, seed: opt.Seed = 0, settings: opt.Set = None,
    anew: opt.Anew = False, task_set: opt.TaskSet = None, skip_bad: opt.SkipBad = False,
) -> Shown:  # fmt: skip
    """Train a model on labelled data, stop early, keep the best. Run again, it goes on where it stopped."""
    from layershare.finetune import FinetuneConfig, finetune

    own = {"seed": seed} | ({} if steps is None else {"steps": steps})
    result = finetune(
        model, data, out, task=task_of(task, task_set, skip_bad), validation=validation, test=test,
        columns=columns(column), new_head=new_head, size=values(size, "--size"),
        config=FinetuneConfig.parse(own | values(settings, "--set")), resume=not anew,
    )  # fmt: skip
    return made(result, out)


def distill(
    student: opt.Model, *, teacher: opt.Teacher, task: opt.Task, data: opt.Data, out: opt.Out,
    test: opt.Test = None, validation: opt.Validation = None, column: opt.Column = None, steps: opt.Steps = None,
    seed: opt.Seed = 0, cache: opt.TeacherCache = None, settings: opt.Set = None, anew: opt.Anew = False,
    task_set: opt.TaskSet = None, skip_bad: opt.SkipBad = False,
) -> Shown:  # fmt: skip
    """Train a shared model to do what the original does. Run again, it goes on where it stopped."""
    from layershare.heal.config import DistillConfig
    from layershare.heal.folder import heal_folder

    own = {"seed": seed} | ({} if steps is None else {"steps": steps})
    result = heal_folder(
        student, teacher, task_of(task, task_set, skip_bad), data, out, test=files(test), validation=files(validation),
        columns=columns(column),
        config=DistillConfig.parse(own | values(settings, "--set")), cache=cache, resume=not anew,
    )  # fmt: skip
    return made(result, out)


def adapt(
    model: opt.Model, *, task: opt.Task, data: opt.Data, out: opt.Out, method: opt.Method = "lora",
    per_group: opt.PerGroup = False, teacher: opt.MaybeTeacher = None, test: opt.Test = None,
    validation: opt.Validation = None, column: opt.Column = None, steps: opt.Steps = None, seed: opt.Seed = 0,
    settings: opt.AdaptSet = None, anew: opt.Anew = False, task_set: opt.TaskSet = None, skip_bad: opt.SkipBad = False,
) -> Shown:  # fmt: skip
    """Train small modules on a frozen model, shared or not. Saves a PEFT adapter folder."""
    from layershare.adapt.folder import AdaptConfig, MatchConfig, adapt_folder

    given = values(settings, "--set")
    adapter = {"method": method, "share": "group" if per_group else "position", "seed": seed}
    config = AdaptConfig.parse(adapter | part(given, "adapter"), where="adapter")
    training = MatchConfig.parse({"seed": seed} | ({} if steps is None else {"steps": steps}) | given)
    result = adapt_folder(
        model, task_of(task, task_set, skip_bad), data, out, config=config, training=training, teacher=teacher,
        test=files(test), validation=files(validation), columns=columns(column), resume=not anew,
    )  # fmt: skip
    return made(result, out)
