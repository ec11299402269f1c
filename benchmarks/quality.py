"""What is left of a sentence encoder at a given number of stored layer parameters: layershare beside its peers.

    python benchmarks/debian_pairs.py out/debian
    python benchmarks/quality.py training-free --docs docs/benchmarks.md
    python benchmarks/quality.py healed --steps 150 --docs docs/benchmarks.md

The model is the packaged all-MiniLM-L6-v2. It is judged by retrieval (which of 1,000 package descriptions belongs to a
synopsis, R@1) and by STS-B (Spearman), both on texts that nobody trained on. Every side gets the same original, the
same calibration texts, and when healed the same texts, loss, steps, learning rate and seeds. Results are appended to
``--results`` as they come, so an interrupted run goes on where it stopped.
"""

import argparse
import gc
import json
import logging
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import page
import torch

import layershare
from layershare.compress import answer_of, output_change
from layershare.demo import model_folder, write_data
from layershare.heal.config import DistillConfig
from layershare.heal.distill import distill
from layershare.heal.folder import layer_map
from layershare.plan import Group, SharingPlan, StackPlan
from layershare.sharing.moments import Moments, measure
from layershare.sharing.search import SEARCHED
from layershare.store.open import load_model, load_tokenizer
from layershare.tasks import get_task
from layershare.tasks.encoding import batches
from layershare.tasks.sentence_embedding import embed

BUDGETS = (0.8, 0.56, 0.5, 0.33, 0.25)
CALIBRATION = 512
LENGTH = 48


class Made(NamedTuple):
    model: Any
    plan: SharingPlan


class Job:
    """The original, the texts, and how a student is judged."""

    def __init__(self, debian: Path, folder: Path) -> None:
        self.task, self.tokenizer = get_task("sentence-embedding"), load_tokenizer(model_folder())
        self.teacher = load_model(model_folder(), self.task.auto_class)
        self.stacks = layershare.find_stacks(self.teacher)
        self.test = pairs(debian / "synopsis" / "test.jsonl")[:1000]
        train = pairs(debian / "synopsis" / "train.jsonl")
        sts = write_data(folder / "sts-b")
        self.scored = self.task.read([sts["train"]], test=[sts["test"]], split=(1.0, 0.0, 0.0)).test
        texts = [text for pair in train for text in pair]
        random.Random(0).shuffle(texts)  # neighbours in the file are of one kind
        self.calibration = self.encode(texts[:CALIBRATION])
        table = folder / "texts.txt"
        table.write_text("\n".join(texts[CALIBRATION : CALIBRATION + 40_000]) + "\n", encoding="utf-8")
        self.data = self.task.read([table], split=(1.0, 0.0, 0.0))
        self.answer = answer_of(self.task)
        self._moments: Any = None

    def encode(self, texts: list[str]) -> list[dict[str, Any]]:
        rows = self.tokenizer(texts, truncation=True, max_length=LENGTH)
        return [batch for _, batch in batches(self.tokenizer, rows, 32)]

    @property
    def moments(self) -> Any:
        if self._moments is None:
            self._moments = measure(self.teacher, self.calibration, answer=self.answer)
        return self._moments

    def judge(self, model: Any) -> dict[str, float]:
        short, long = (
            embed(model, self.tokenizer, list(side), max_length=LENGTH)
            for side in zip(*self.test, strict=True)
        )
        hits = (short @ long.T).argmax(1) == torch.arange(len(short))
        spearman = self.task.evaluate(model, self.tokenizer, self.scored)["spearman"]
        return {"r1": float(hits.float().mean()), "spearman": spearman}


def pairs(file: Path) -> list[tuple[str, str]]:
    """Synopsis and description of each line. Packages of one source often begin alike: the first of them is taken."""
    found: dict[str, tuple[str, str]] = {}
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        short, long = row["synopsis"], row["description"]
        if len(short.split()) >= 3 and len(long.split()) >= 12:
            found.setdefault(long[:80], (short, long))
    return list({short: (short, long) for short, long in found.values()}.values())


def ours(job: Job, budget: float) -> Made:
    change = output_change(job.task, job.teacher, job.calibration[:8])
    plan = SEARCHED["auto"](job.teacher, job.stacks, budget, change, lambda: job.moments)
    return Made(layershare.share(job.teacher, plan, calibration=job.moments), plan)


def drop(job: Job, budget: float) -> Made:
    plan = SEARCHED["drop"](job.teacher, job.stacks, budget, float, Moments)
    return Made(layershare.share(job.teacher, plan), plan)


def svd(job: Job, budget: float) -> Made:
    """Every matrix at one density, the highest that fits."""
    for per_mille in range(999, 0, -1):
        plan = SharingPlan(stacks=tuple(evenly(stack, per_mille / 1000) for stack in job.stacks))
        if layershare.predict(job.stacks, plan).ratio <= budget:
            return Made(layershare.share(job.teacher, plan, calibration=Moments(job.moments.inputs)), plan)
    raise SystemExit(f"nothing fits {budget}")


def evenly(stack: Any, density: float) -> StackPlan:
    groups = [
        Group(positions=(position,), parts=(weight.name,), method="basis", rank=rank)
        for position in range(stack.length)
        for weight in stack.layers[position]
        if weight.factorable and (rank := int(density * weight.size / sum(weight.shape)))
    ]
    return StackPlan(name=stack.name, length=stack.length, groups=tuple(groups))


def basis(job: Job, budget: float) -> Made:
    plan = layershare.make_plan(job.teacher, "basis", budget=budget)
    return Made(layershare.share(job.teacher, plan, calibration=Moments(job.moments.inputs)), plan)


def tied(job: Job, budget: float) -> Made:
    """The most unique layers that leave room for a correction of rank 8 or more at each position."""
    stack = job.stacks[0]
    for unique in range(stack.length - 1, 0, -1):
        fits = [
            plan
            for rank in range(8, 200, 8)
            if (plan := attempt(job, unique, rank)) and layershare.predict(job.stacks, plan).ratio <= budget
        ]
        if fits:
            return Made(layershare.share(job.teacher, fits[-1]), fits[-1])
    raise SystemExit(f"nothing fits {budget}")


def attempt(job: Job, unique: int, rank: int) -> SharingPlan | None:
    try:
        return layershare.make_plan(job.teacher, "sequence", unique=unique, rank=rank)
    except layershare.LayershareError:
        return None


SIDES: dict[str, Callable[[Job, float], Made]] = {
    "layershare (auto)": ours,
    "layer drop": drop,
    "per-layer whitened SVD (as SVD-LLM)": svd,
    "shared basis over pairs (as Basis Sharing)": basis,
    "tied + weight-SVD corrections (as Relaxed Recursive)": tied,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=["training-free", "healed"])
    parser.add_argument("--debian", type=Path, default=Path("out/debian"))
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--sides", nargs="+", help="only these, by the beginning of their names")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=150, help="of healing")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("out/quality.jsonl"))
    parser.add_argument("--docs", type=Path, help="write the table to this page")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    options.results.parent.mkdir(parents=True, exist_ok=True)
    job = Job(options.debian, options.results.parent)
    rows = run(job, options)
    section = table(rows, options)
    print(section)
    if options.docs:
        page.write(options.docs, section)


def run(job: Job, options: argparse.Namespace) -> list[dict[str, Any]]:
    healed = (
        {"steps": options.steps, "batch": options.batch_size, "tokens": LENGTH}
        if options.table == "healed"
        else {"steps": 0}
    )
    rows = (
        [json.loads(line) for line in options.results.read_text().splitlines()]
        if options.results.exists()
        else []
    )
    rows = [row for row in rows if row["healed"] == healed]
    seeds = options.seeds if healed["steps"] else [0]
    wanted = [("original", 1.0, 0)]
    names = [
        name for name in SIDES if not options.sides or any(name.startswith(one) for one in options.sides)
    ]
    wanted += [(name, budget, seed) for seed in seeds for budget in options.budgets for name in names]
    for name, budget, seed in wanted:
        if any((row["side"], row["budget"], row["seed"]) == (name, budget, seed) for row in rows):
            continue
        started = time.monotonic()
        made = SIDES[name](job, budget) if name in SIDES else Made(job.teacher, SharingPlan())
        if healed["steps"] and name in SIDES:
            heal(job, made, options, seed)
        row = {"side": name, "budget": budget, "seed": seed, "healed": healed} | job.judge(made.model)
        row |= {
            "stored": layershare.count(made.model).layer_unique,
            "seconds": round(time.monotonic() - started),
        }
        print(json.dumps(row), flush=True)
        with options.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        del made
        gc.collect()
    return rows


def heal(job: Job, made: Made, options: argparse.Namespace, seed: int) -> None:
    config = DistillConfig(
        steps=options.steps,
        batch_size=options.batch_size,
        save_every=options.steps,
        max_length=LENGTH,
        seed=seed,
    )
    folder = options.results.parent / "healing"
    distill(
        made.model, job.teacher, job.tokenizer, job.task, job.data, config, folder,
        layer_map=layer_map(made.plan, made.model), resume=False, quiet=True,
    )  # fmt: skip
    made.model.eval()


def table(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    whole = next(row for row in rows if row["side"] == "original")
    title = "training-free" if options.table == "training-free" else f"healed by {options.steps} steps"
    lines = [
        f"## Quality: {title}",
        "",
        "all-MiniLM-L6-v2 (6 x 384, 10,646,784 layer parameters). Retention, in per cent, of the original's R@1",
        f"({whole['r1']:.3f}, 1,000 Debian synopses and descriptions) and of its Spearman on STS-B",
        f"({whole['spearman']:.4f}).",
        "",
    ]
    if options.table == "healed":
        lines += [
            f"{options.steps} steps of {options.batch_size} texts of at most {LENGTH} tokens, one loss, one learning",
            "rate, the teacher's outputs as targets; seeds as given, mean and (lowest to highest).",
            "",
        ]
    lines += ["| budget | | stored | R@1 | Spearman | seconds |", "|---:|---|---:|---:|---:|---:|"]
    for budget in sorted({row["budget"] for row in rows} - {1.0}, reverse=True):
        for name in SIDES:
            same = [row for row in rows if (row["side"], row["budget"]) == (name, budget)]
            if same:
                lines.append(line(budget, name, same, whole))
    command = f"python benchmarks/quality.py {options.table}"
    if options.table == "healed":
        command += f" --steps {options.steps} --batch-size {options.batch_size}"
        command += f" --seeds {' '.join(map(str, options.seeds))}"
    return "\n".join([*lines, "", f"    {command}", ""])


def line(budget: float, name: str, rows: list[dict[str, Any]], whole: dict[str, Any]) -> str:
    figures = []
    for key in ("r1", "spearman"):
        kept = [100 * row[key] / whole[key] for row in rows]
        spread = f" ({min(kept):.1f} to {max(kept):.1f})" if len(kept) > 1 else ""
        figures.append(f"{statistics.mean(kept):.1f}{spread}")
    stored = rows[0]["stored"] / whole["stored"]
    seconds = statistics.median(row["seconds"] for row in rows)
    return f"| {budget:.0%} | {name} | {stored:.1%} | {figures[0]} | {figures[1]} | {seconds:.0f} |"


if __name__ == "__main__":
    main()
