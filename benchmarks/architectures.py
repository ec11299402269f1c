"""The laws of sharing on every model type of the installed transformers that can be built small.

    python benchmarks/architectures.py [--results FILE] [--again] [MODEL_TYPE ...]

Each type is checked in a child process with a limit on its time. Results are JSON lines, one a type; types that are
in the file are left out, unless ``--again`` is given, which repeats those that did not pass. When it is through, the
table in docs/architectures.md can be made: ``layershare architectures --laws FILE -o docs/architectures.md``.
"""

import argparse
import json
import logging
import os
import resource
import signal
import time
import warnings
from pathlib import Path

import torch
import transformers

from layershare.architectures.laws import check_laws
from layershare.architectures.small import auto_classes, model_types, small_model
from layershare.errors import ModelError

CPU_SECONDS = 20
WALL_SECONDS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types, default all")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--again", action="store_true", help="repeat what did not pass")
    options = parser.parse_args()
    quiet()
    done = read(options.results)
    for kind in options.types or model_types():
        if kind in done and not options.types and (not options.again or done[kind]["outcome"] == "pass"):
            continue
        done[kind] = in_child(kind)
        write(options.results, done)
        print(f"{kind}: {done[kind]['outcome']} {done[kind].get('reason', '')}", flush=True)
    print(
        f"{sum(row['outcome'] == 'pass' for row in done.values())} of {len(done)} model types keep all laws"
    )


def quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


def read(file: Path) -> dict[str, dict]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {row["type"]: row for row in map(json.loads, lines)}


def write(file: Path, rows: dict[str, dict]) -> None:
    part = file.with_suffix(".part")
    part.write_text("".join(json.dumps(rows[kind]) + "\n" for kind in sorted(rows)), encoding="utf-8")
    part.replace(file)


def in_child(kind: str) -> dict:
    """Check one type in a forked child. Its modules are imported before, so that later types find them."""
    preload(kind)
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        signal.alarm(WALL_SECONDS)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        with os.fdopen(into, "w") as pipe:
            json.dump(check(kind), pipe)
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return (
        json.loads(text) if text else {"type": kind, "outcome": "too slow", "reason": f"over {CPU_SECONDS} s"}
    )


def preload(kind: str) -> None:
    for auto in auto_classes(kind)[:2]:
        try:
            name = getattr(transformers, auto)._model_mapping._model_mapping[kind]
            getattr(transformers, name if isinstance(name, str) else name[0])
        except Exception:  # noqa: S112 - the child will say so
            continue


def check(kind: str) -> dict:
    began = time.process_time()
    row: dict = {"type": kind}
    try:
        small = small_model(kind)
        row |= {"class": small.auto_class, "model": type(small.model).__name__, "parameters": small.size}
        report = check_laws(small.model, small.inputs, small.auto_class)
        row |= {"kept": len(report.kept), "failed": report.failed, "skipped": report.skipped}
        row["outcome"] = "fail" if report.failed else "pass"
        row["reason"] = next((f"{law}: {why}" for law, why in (report.failed or report.skipped).items()), "")
    except ModelError as error:
        built = "class" in row
        row |= {"outcome": "no stack" if built else "not built", "reason": str(error)}
    except BaseException as error:
        row |= {"outcome": "fail", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    return row | {"seconds": round(time.process_time() - began, 1)}


if __name__ == "__main__":
    main()
