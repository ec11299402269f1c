"""How long distillation takes: with the teacher's outputs kept, without, and with TextBrewer, on one and the same job.

    python benchmarks/distill_speed.py [--texts 1280] [--epochs 3] [--repeats 3] [--docs docs/benchmarks.md]

The job: a student with every other layer of the packaged all-MiniLM-L6-v2 learns the teacher's hidden states on
sentences of STS-B. All sides get the same student, batches, loss, optimizer (AdamW), schedule and number of steps, and
run in turn, so that a change of the machine's speed meets all alike. Times are from both models in memory to the
trained student, all computing of the teacher included. TextBrewer (pip install --no-deps textbrewer==0.2.1.post1) is
left out where it is not installed.
"""

import argparse
import copy
import logging
import math
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from page import write
from torch import nn
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

import layershare
from layershare.demo import model_folder, write_data
from layershare.heal.collator import Collator
from layershare.heal.config import DistillConfig, LossWeights
from layershare.heal.distill import distill
from layershare.heal.folder import layer_map
from layershare.store.open import load_model, load_tokenizer
from layershare.tasks import get_task
from layershare.tasks.encoding import INPUTS, batches
from layershare.train import length_grouped_order

TITLE = "## Distillation speed"
BATCH = 64
JUDGED = 500


class Job:
    """What all sides have in common."""

    def __init__(self, texts: int, epochs: int, steps: int | None, folder: Path) -> None:
        self.task, self.tokenizer = get_task("sentence-embedding"), load_tokenizer(model_folder())
        self.teacher = load_model(model_folder(), self.task.auto_class)
        files = write_data(folder / "sts-b")
        data = self.task.read([files["train"]], test=[files["test"]], split=(1.0, 0.0, 0.0))
        # Single texts, so that the number of steps is known: half of the pairs' texts would come twice.
        sentences = self.task.texts(data)[:texts]
        table = folder / "texts.txt"
        table.write_text("\n".join(sentences) + "\n", encoding="utf-8")
        self.data = self.task.read([table], split=(1.0, 0.0, 0.0))
        self.judged = data.test.select(range(JUDGED))  # type: ignore[union-attr]
        self.steps = steps or math.ceil(epochs * len(sentences) / BATCH)
        self.texts = len(sentences)
        self.config = DistillConfig(
            steps=self.steps,
            batch_size=BATCH,
            save_every=self.steps,
            weights=LossWeights(embedding=0, similarity=0, hidden=1),
        )
        self.plan = layershare.make_plan(self.teacher, "drop", unique=3)
        self.student = layershare.share(self.teacher, self.plan)
        self.pairs = layer_map(self.plan, self.student) or []

    def quality(self, student: Any) -> float:
        return self.task.evaluate(student, self.tokenizer, self.judged)["spearman"]


def ours(job: Job, student: Any, out: Path, cache: Path | None, **changes: Any) -> None:
    config = job.config.model_copy(update=changes)
    distill(
        student,
        job.teacher,
        job.tokenizer,
        job.task,
        job.data,
        config,
        out,
        layer_map=job.pairs,
        cache=cache,
        quiet=True,
    )


def textbrewer(job: Job, student: Any, out: Path) -> None:
    """The same with TextBrewer's GeneralDistiller: masked MSE of hidden states, weighted as ours."""
    from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig  # type: ignore[import-not-found]

    config = job.config
    rows = job.task.encode(job.tokenizer, job.data.train, config.max_length)
    order = length_grouped_order(list(map(len, rows["input_ids"])), BATCH, job.steps, config.seed)
    collator = Collator(job.tokenizer)

    def collate(some: list[int]) -> dict[str, torch.Tensor]:
        batch = collator([{**rows[i], "row": i, "position": 0} for i in some])
        return {name: batch[name] for name in INPUTS if name in batch}

    loader = DataLoader(order, batch_size=BATCH, collate_fn=collate)
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # TextBrewer trains in train mode, we train without dropout
        if isinstance(module, nn.Embedding):
            module.weight.requires_grad_(False)
    decayed = [p for p in student.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in student.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
    )
    sizes = mean_squares(job)
    matches = [
        {
            "layer_T": theirs + 1,
            "layer_S": mine + 1,
            "feature": "hidden",
            "loss": "hidden_mse",
            "weight": 1 / (len(job.pairs) * sizes[theirs]),
        }
        for mine, theirs in job.pairs
    ]
    steps = {"num_warmup_steps": round(config.warmup_ratio * job.steps), "num_training_steps": job.steps}

    def adapt(batch: dict, outputs: Any) -> dict:
        return {"hidden": outputs.hidden_states, "inputs_mask": batch["attention_mask"]}

    distiller = GeneralDistiller(
        train_config=TrainingConfig(ckpt_steps=job.steps, output_dir=str(out), device="cpu"),
        distill_config=DistillationConfig(kd_loss_weight=0, intermediate_matches=matches),
        model_T=job.teacher,
        model_S=student,
        adaptor_T=adapt,
        adaptor_S=adapt,
    )
    with distiller:
        distiller.train(
            optimizer,
            loader,
            num_steps=job.steps,
            scheduler_class=get_linear_schedule_with_warmup,
            scheduler_args=steps,
            max_grad_norm=config.max_grad_norm,
            callback=None,
            output_hidden_states=True,
        )


def mean_squares(job: Job) -> dict[int, float]:
    """The mean square of the teacher's hidden states, by layer: our loss is relative to it."""
    rows = job.task.encode(job.tokenizer, job.data.train, job.config.max_length)[:256]
    (_, batch), *_ = batches(job.tokenizer, rows, 256)
    with torch.no_grad():
        states = job.task.forward(job.teacher, batch, hidden_states=True).hidden_states
    mask = batch["attention_mask"].bool()
    return {layer: float(states[layer + 1][mask].square().mean()) for _, layer in job.pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=1280, help="sentences to train on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, help="instead of --epochs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--docs", type=Path, help="write the result to this section of a page")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp())
    try:
        job = Job(options.texts, options.epochs, options.steps, folder)
        page = report(job, measure(job, options.repeats, folder), options)
    finally:
        shutil.rmtree(folder)
    print(page)
    if options.docs:
        write(options.docs, page)


def measure(job: Job, repeats: int, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Side -> (seconds, quality) of each repeat."""

    def sides(run: Path) -> dict[str, Callable[[Any], None]]:
        found: dict[str, Callable[[Any], None]] = {
            "teacher at each step": lambda s: ours(job, s, run / "live", None, cache_mb=0),
            "teacher kept (first run)": lambda s: ours(job, s, run / "first", run / "cache"),
            "teacher kept (later runs)": lambda s: ours(job, s, run / "later", run / "cache"),
        }
        if find_spec("textbrewer") is None:
            print("textbrewer is not installed, so it is left out")
        else:
            # It imports a writer of logs, which is not used here.
            sys.modules.setdefault("tensorboardX", cast(Any, SimpleNamespace(SummaryWriter=None)))
            found["TextBrewer 0.2.1.post1"] = lambda s: textbrewer(job, s, run / "textbrewer")
        return found

    figures: dict[str, list[tuple[float, float]]] = {}
    for repeat in range(repeats):
        run = folder / str(repeat)
        for name, side in sides(run).items():
            student = copy.deepcopy(job.student)
            started = time.perf_counter()
            side(student)
            seconds = time.perf_counter() - started
            figures.setdefault(name, []).append((seconds, job.quality(student.eval())))
            print(
                f"{repeat + 1}/{repeats} {name}: {seconds:.1f} s, spearman {figures[name][-1][1]:.4f}",
                flush=True,
            )
        shutil.rmtree(run)
    return figures


def report(job: Job, figures: dict[str, list[tuple[float, float]]], options: argparse.Namespace) -> str:
    first = statistics.median(seconds for seconds, _ in next(iter(figures.values())))
    table = []
    for name, found in figures.items():
        seconds, quality = ([one[i] for one in found] for i in (0, 1))
        median = statistics.median(seconds)
        spread = f"{min(seconds):.1f} to {max(seconds):.1f}"
        table.append(
            f"| {name} | {median:.1f} | {spread} | {first / median:.2f} | {statistics.median(quality):.4f} |"
        )
    steps = f"--steps {options.steps}" if options.steps else f"--epochs {options.epochs}"
    command = f"--texts {options.texts} {steps} --repeats {options.repeats} --threads {options.threads}"
    return "\n".join(
        [
            TITLE,
            "",
            f"A student with {len(job.pairs)} of the 6 layers of all-MiniLM-L6-v2 learns the teacher's hidden states:",
            f"{job.texts:,} sentences of STS-B, {job.steps} steps of {BATCH}, {options.threads} threads, all sides in",
            f"turn, medians of {options.repeats} runs. Quality is Spearman's on {JUDGED} test pairs; before",
            f"training it is {job.quality(job.student):.4f}.",
            "",
            "| | seconds | from, to | times as fast | quality |",
            "|---|---:|---:|---:|---:|",
            *table,
            "",
            "The first run computes the teacher's outputs and writes them; later runs, with other students, seeds or",
            "losses, read them.",
            "",
            f"    python benchmarks/distill_speed.py {command}",
            "",
        ]
    )


if __name__ == "__main__":
    main()
