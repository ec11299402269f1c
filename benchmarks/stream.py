"""Sharing a checkpoint larger than memory: time and memory beside a plain cp, and beside mergekit.

    python benchmarks/stream.py [--layers 32] [--repeats 3] [--mergekit VENV/bin/mergekit-yaml] [--docs FILE]

The checkpoint: Llama-2-7B's shapes with random bf16 weights, made here, in shards of 5 GB. All sides average its layers
in pairs, run in turn as processes of their own, and start with the checkpoint out of the page cache. Time is until the
process ends, memory the most it had resident (files it maps included). The measure for time is cp: of as many bytes as
layershare writes, after which the other bytes that layershare reads are read to /dev/null.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# No torch here: a process inherits the peak of the one that starts it.

TITLE = "## Sharing checkpoints larger than memory"
Figures = dict[
    str, list[tuple[float, float, int]]
]  # side -> seconds, peak bytes, bytes written, of each repeat


def make(folder: Path, layers: int) -> None:
    """Write the checkpoint, tensor by tensor. All numbers are cut from one random row: they do not matter for speed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from layershare.store.shards import Shards

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32, vocab_size=32000
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, state_dict={})
    torch.manual_seed(0)
    row = torch.randn(2**27).bfloat16() * 0.02
    tensors = model.state_dict()
    with Shards(folder, tensors, model.num_parameters()) as shards:
        for number, (name, tensor) in enumerate(tensors.items()):
            start = number * 4099 % (len(row) - 2**20)
            piece = row[start:]
            while len(piece) < tensor.numel():
                piece = torch.cat([piece, row])
            shards.put(name, piece[: tensor.numel()].view(tensor.shape))


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def size(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def forget(folder: Path) -> None:
    """Take the files out of the page cache, after everything that waits is on the disk."""
    os.sync()
    for file in folder.iterdir():
        with file.open("rb") as open_file:
            os.posix_fadvise(open_file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, out: Path, written: int) -> list[str]:
    """A shell's way to read all of ``source`` and to write ``written`` bytes of it."""
    commands = [f"mkdir {out}"]
    for file in weights(source):
        length = min(written, file.stat().st_size)
        written -= length
        if length == file.stat().st_size:
            commands.append(f"cp {file} {out}")
        elif length:
            cut = f"dd if={file} bs=1M status=none"
            commands += [f"{cut} of={out / file.name} count={length} iflag=count_bytes"]
            commands += [f"{cut} of=/dev/null skip={length} iflag=skip_bytes"]
        else:
            commands.append(f"cat {file} > /dev/null")
    return ["sh", "-ec", "\n".join(commands)]


def share(source: Path, out: Path, layers: int) -> list[str]:
    words = [
        sys.executable,
        "-m",
        "layershare",
        "share",
        source,
        "--unique",
        layers // 2,
        "--stream",
        "-o",
        out,
    ]
    return list(map(str, words))


def mergekit(program: Path, source: Path, out: Path, layers: int) -> list[str]:
    """Each average once: a model of half the depth, the least that mergekit can write."""
    twin = source.with_name("twin")  # it refuses to merge a model with itself, so it gets a folder of links
    if not twin.is_dir():
        twin.mkdir()
        for file in source.iterdir():
            (twin / file.name).symlink_to(file)
    lines = ["merge_method: linear", "dtype: bfloat16", "slices:"]
    for first in range(0, layers, 2):
        lines.append("  - sources:")
        for model, layer in ((source, first), (twin, first + 1)):
            lines += [f"      - model: {model}", f"        layer_range: [{layer}, {layer + 1}]"]
            lines += ["        parameters: {weight: 0.5}"]
    config = source.with_name("mergekit.yaml")
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [str(program), str(config), str(out), "--quiet"]


def measured(command: list[str], out: Path, log: Path) -> tuple[float, float, int, int]:
    with log.open("wb") as said:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
    if status:
        sys.exit(f"{' '.join(command)[:500]}\n{log.read_text(errors='replace')[-3000:]}")
    written = size(weights(out) or list(out.iterdir()))
    shutil.rmtree(out)
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, written


def measure(source: Path, options: argparse.Namespace) -> Figures:
    out, layers = source.with_name("out"), options.layers
    figures: Figures = {}
    *_, written = measured(
        share(source, out, layers), out, source.with_name("log")
    )  # how much cp has to write
    sides: dict[str, Callable[[], list[str]]] = {
        "cp": lambda: copy(source, out, written),
        "layershare": lambda: share(source, out, layers),
    }
    if options.mergekit is None:
        print("no --mergekit, so it is left out")
    else:
        sides["mergekit 0.1.5"] = lambda: mergekit(options.mergekit, source, out, layers)
    for repeat in range(options.repeats):
        for name, side in sides.items():
            command = side()
            forget(source)
            found = measured(command, out, source.with_name("log"))
            figures.setdefault(name, []).append(found)
            print(
                f"{repeat + 1}/{options.repeats} {name}: {found[0]:.1f} s, {found[1]:.1f} s of processors, "
                f"{found[2] / 1e9:.2f} GB resident, {found[3] / 1e9:.2f} GB written",
                flush=True,
            )
    return figures


def report(source: Path, figures: Figures, options: argparse.Namespace) -> str:
    base = statistics.median(seconds for seconds, *_ in figures["cp"])
    table = []
    for name, found in figures.items():
        seconds, processors, peak, written = zip(*found, strict=True)
        median = statistics.median(seconds)
        table.append(
            f"| {name} | {median:.1f} | {min(seconds):.1f} to {max(seconds):.1f} | {median / base:.2f} "
            f"| {statistics.median(processors):.1f} | {max(peak) / 1e9:.2f} | {written[0] / 1e9:.2f} |"
        )
    shards = weights(source)
    command = f"--layers {options.layers} --repeats {options.repeats} --mergekit VENV/bin/mergekit-yaml"
    return "\n".join(
        [
            TITLE,
            "",
            f"A Llama of {options.layers} layers with the shapes of Llama-2-7B and random bf16 weights,",
            f"{size(shards) / 1e9:.2f} GB in {len(shards)} shards. `layershare share --stream` and `mergekit-yaml`",
            "average its layers in pairs. All sides run in turn, from a cold page cache, as processes of their own on",
            f"{os.cpu_count()} cores; medians of {options.repeats} runs, from the start of the process to its end,",
            "not waiting for the disk after it. cp copies as many bytes as layershare writes, and then the other bytes",
            "that layershare reads are read to /dev/null. Memory is the most that was resident, mapped files included.",
            "",
            "| | seconds | from, to | times cp | processor seconds | peak memory, GB | written, GB |",
            "|---|---:|---:|---:|---:|---:|---:|",
            *table,
            "",
            "mergekit 0.1.5 does not merge a model with itself: it gets the folder twice, the second time as links. It",
            "writes each average once here, a model of half the depth; for the same depth it would write each twice.",
            "",
            f"    python benchmarks/stream.py {command}",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32, help="32 are 13.5 GB, each 0.4 GB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--mergekit", type=Path, help="the program mergekit-yaml of an environment of its own"
    )
    parser.add_argument(
        "--folder", type=Path, help="where to put the files (35 GB); default: for temporary files"
    )
    parser.add_argument("--docs", type=Path, help="write the result to this section of a page")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make, options.layers)
        return
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        source = folder / "model"
        source.mkdir()
        subprocess.run(
            [sys.executable, __file__, "--make", source, "--layers", str(options.layers)], check=True
        )
        page = report(source, measure(source, options), options)
    finally:
        shutil.rmtree(folder)
    print(page)
    if options.docs:
        from page import write

        write(options.docs, page)


if __name__ == "__main__":
    main()
