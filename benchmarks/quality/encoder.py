"""all-MiniLM-L6-v2, judged by retrieval (R@1) and by STS-B (Spearman), on texts that nobody trained on."""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from layershare.demo import model_folder, write_data
from layershare.store.open import load_model, load_tokenizer
from layershare.tasks import get_task
from layershare.tasks.encoding import batches
from layershare.tasks.sentence_embedding import embed
from quality.subject import Batches, Subject, short_hash

CALIBRATION = 2048
SEEDS = 4
HEALING = 20_000
"""Descriptions and synopses to heal on, beside the sentences."""
SETS = 2
"""So many sets of ``BLOCK`` pairs the packages held out make. More are of packages of which neither text is learned."""
LENGTH = 48
BLOCK = 1000


class Encoder(Subject):
    title = "all-MiniLM-L6-v2"
    told = (
        "all-MiniLM-L6-v2 (6 x 384, 10,646,784 layer parameters). Retention, in per cent, of the original's R@1",
        "({r1:.4f}, which of 1,000 Debian descriptions belongs to a synopsis; mean of {subject.sets} such sets)",
        "and of its Spearman on STS-B ({spearman:.4f}). Calibrated on 2,048 training texts, half of Debian,",
        "half of STS-B; layershare (auto) is fitted in order (`share --fit sequential`).",
    )
    figures = {"r1": "R@1", "spearman": "Spearman", "agreement": "nearest as in the original"}  # noqa: RUF012
    basis_shares = (
        "attention.self.query.weight",
        "attention.self.key.weight",
        "attention.self.value.weight",
        "intermediate.dense.weight",
    )
    adapted = r".*\.layer\.\d+\..*(query|key|value|dense)"
    length = LENGTH

    def __init__(self, debian: Path, folder: Path, sets: int = SETS) -> None:
        task = get_task("sentence-embedding")
        super().__init__(
            load_model(model_folder(), task.auto_class), task, load_tokenizer(model_folder()), folder
        )
        test = pairs(debian / "synopsis" / "test.jsonl")
        self.tests = [test[i : i + BLOCK] for i in range(0, len(test) - BLOCK + 1, BLOCK)]
        sts = write_data(folder / "sts-b")
        read = task.read([sts["train"]], test=[sts["test"]], split=(1.0, 0.0, 0.0))
        self.scored = read.test
        sentences = sorted(
            {read.train[side][i] for i in range(len(read.train)) for side in ("text", "text_pair")}
        )
        known = pairs(debian / "synopsis" / "train.jsonl")
        train, sentences = mixed([text for pair in known for text in pair]), mixed(sentences)
        half = CALIBRATION * SEEDS // 2
        self.texts = [text for both in zip(train[:half], sentences[:half], strict=True) for text in both]
        table = folder / "texts.txt"
        rest = train[half:][:HEALING] + sentences[half:]
        table.write_text("\n".join(rest) + "\n", encoding="utf-8")
        used = {*train[: half + HEALING]}
        unused = mixed([pair for pair in known if used.isdisjoint(pair)], key="\n".join)
        self.tests += [unused[i : i + BLOCK] for i in range(0, (sets - SETS) * BLOCK, BLOCK)]
        self.sets = len(self.tests)
        self.judged = short_hash(text.encode() for test in self.tests for pair in test for text in pair)
        self.data = task.read([table], split=(1.0, 0.0, 0.0))

    def sample(self, seed: int) -> Batches:
        some = self.texts[CALIBRATION * (seed % SEEDS) :][:CALIBRATION]
        rows = self.tokenizer(some, truncation=True, max_length=LENGTH)
        return [batch for _, batch in batches(self.tokenizer, rows, 32)]

    def judge(self, model: Any) -> dict[str, float]:
        found = [self.nearest(model, test) for test in self.tests]
        right = [(one == torch.arange(len(one))).float().mean() for one in found]
        same = [(one == his).float().mean() for one, his in zip(found, self.originals, strict=True)]
        spearman = self.task.evaluate(model, self.tokenizer, self.scored)["spearman"]
        return {"r1": mean(right), "spearman": spearman, "agreement": mean(same)}

    @cached_property
    def originals(self) -> list[torch.Tensor]:
        """What is nearest in the original."""
        return [self.nearest(self.teacher, test) for test in self.tests]

    def nearest(self, model: Any, test: list[tuple[str, str]]) -> torch.Tensor:
        """Which of the descriptions is nearest to each synopsis."""
        short, long = (
            embed(model, self.tokenizer, list(side), max_length=LENGTH) for side in zip(*test, strict=True)
        )
        return (short @ long.T).argmax(1)


def mean(values: list[torch.Tensor]) -> float:
    return float(torch.stack(values).mean())


def mixed(texts: Sequence[Any], key: Callable[[Any], str] = str) -> list[Any]:
    """In an order of no meaning, as neighbours in a file are of one kind; a text more or less moves no other."""
    return sorted(texts, key=lambda text: hashlib.sha256(key(text).encode()).digest())


def pairs(file: Path) -> list[tuple[str, str]]:
    """Synopsis and description of each line. Packages of one source often begin alike: the first of them is taken."""
    found: dict[str, tuple[str, str]] = {}
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        short, long = row["synopsis"], row["description"]
        if len(short.split()) >= 3 and len(long.split()) >= 12:
            found.setdefault(long[:80], (short, long))
    return list({short: (short, long) for short, long in found.values()}.values())
