"""Verbs for a model that goes out: export, bench."""

from layershare import options as opt
from layershare.cli.answer import Shown, note


def export(
    folder: opt.Folder, *, out: opt.Out, form: opt.ExportFormat = "dense", int8: opt.Int8 = False
) -> Shown:
    """Write a model for other tools. dense: every position with its own weights; onnx: every weight once."""
    from layershare.export import export

    made = export(folder, out, form, int8=int8)
    return Shown(f"{made}\nSaved in {out}", made.to_dict())


def bench(
    folders: opt.Benched, *, tokens: opt.Tokens = 12, new: opt.NewTokens = 16, batch: opt.LargeBatch = 32,
    threads: opt.Threads = None, out: opt.BenchOut = None,
) -> Shown:  # fmt: skip
    """Measure models and exports side by side, in turns: size, memory, latency, throughput. No quality."""
    from layershare.measure.bench import bench
    from layershare.report.bench_page import check, save

    if out is not None:
        check(out)  # before minutes of measuring
    made = bench(folders, tokens=tokens, new=new, batch=batch, threads=threads, progress=note)
    if out is not None:
        save(made, out)
    return Shown("\n".join([made.machine, "", made.table(), "", *made.notes()]), made.model_dump(mode="json"))
