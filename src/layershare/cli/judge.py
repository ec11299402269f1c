"""Verbs that measure and tell: evaluate, verify, report, architectures."""

from layershare import options as opt
from layershare.cli.answer import Shown, account, columns, note, task_of


def evaluate(
    models: opt.Models, *, task: opt.Task, data: opt.Data, column: opt.Column = None, task_set: opt.TaskSet = None,
    skip_bad: opt.SkipBad = False,
) -> Shown:  # fmt: skip
    """Measure models side by side. Quality, parameters, bytes, memory and latency, on the same data."""
    from layershare.measure.evaluate import evaluate

    kind = task_of(task, task_set, skip_bad)
    result = evaluate(models, kind, data, columns=columns(column), progress=note)
    return Shown(result.table(), result.model_dump(mode="json"))


def verify(folder: opt.Folder) -> Shown:
    """Load a shared model and prove that its ties hold."""
    from layershare.store.open import load_model

    return account(load_model(folder), folder)


def report(folder: opt.Folder) -> Shown:
    """Write report.html and README.md anew. They are made from the result.json of the folder."""
    from layershare.report import write

    written = [str(file) for file in write(folder)]
    return Shown("\n".join(written), {"written": written})


def architectures(*, out: opt.PageOut = None, laws: opt.Laws = None) -> Shown:
    """Find the stacks of every model type that the installed transformers knows. Takes minutes, reads no weights."""
    from layershare.architectures import table, write

    made = table(laws=laws, progress=note)
    if out is not None:
        write(out, made)
    return Shown(made.text(), made.to_dict())
