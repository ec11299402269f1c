"""Verbs for a model that goes out: exits, export, bench."""

from layershare import options as opt
from layershare.cli.answer import Shown, columns, made, note, task_of, values


def exits(
    model: opt.Model, *, data: opt.Data, out: opt.Out, task: opt.Task = "text-classification", test: opt.Test = None,
    validation: opt.Validation = None, column: opt.Column = None, max_loss: opt.MaxLoss = 0.005, seed: opt.Seed = 0,
    settings: opt.ExitsSet = None, skip_bad: opt.SkipBad = False,
) -> Shown:  # fmt: skip
    """Let a classifier answer behind an earlier layer where it is sure. Its answers in full depth stay as they are."""
    from layershare.exits import ExitsConfig
    from layershare.exits.folder import add_exits

    own = {"max_loss": max_loss, "seed": seed}
    result = add_exits(
        model, data, out, task=task_of(task, None, skip_bad), validation=validation, test=test,
        columns=columns(column), config=ExitsConfig.parse(own | values(settings, "--set")),
    )  # fmt: skip
    shown = made(result, out)
    return Shown("\n".join([*result.notes[-5:-1], "", shown.text]), shown.data)


def export(
    folder: opt.Folder, *, out: opt.Out, form: opt.ExportFormat = "dense", int8: opt.Int8 = False
) -> Shown:
    """Write a model for other tools. dense: every position with its own weights; onnx: every weight once."""
    from layershare.export import export

    found = export(folder, out, form, int8=int8)
    return Shown(f"{found}\nSaved in {out}", found.to_dict())


def bench(
    folders: opt.Benched, *, tokens: opt.Tokens = 12, new: opt.NewTokens = 16, batch: opt.LargeBatch = 32,
    threads: opt.Threads = None, out: opt.BenchOut = None,
) -> Shown:  # fmt: skip
    """Measure models and exports side by side, in turns: size, memory, latency, throughput. No quality."""
    from layershare.measure.bench import bench
    from layershare.report.bench_page import check, save

    if out is not None:
        check(out)  # before minutes of measuring
    found = bench(folders, tokens=tokens, new=new, batch=batch, threads=threads, progress=note)
    if out is not None:
        save(found, out)
    return Shown(
        "\n".join([found.machine, "", found.table(), "", *found.notes()]), found.model_dump(mode="json")
    )
