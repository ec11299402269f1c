"""Emoji as labelled images: the drawings of several vendors, by Unicode's groups.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python benchmarks/emoji.py out/emoji emoji-datasource-*.tgz

writes ``out/emoji/PART/GROUP/CODE-VENDOR.png`` for the parts train and test, 64 x 64 pixels on white. An emoji is in
one part only, whoever drew it; those with a tone of skin are left out. The drawings have the licences of their vendors:
use them, do not pass them on.
"""

import hashlib
import io
import json
import sys
import tarfile
from collections import Counter
from pathlib import Path

from PIL import Image

LEFT_OUT = {"Component"}
TEST = 5
"""One emoji in so many is for testing."""


def write(archive: Path, out: Path) -> Counter[str]:
    """Write the drawings in the npm package ``archive``; returns how many each part got."""
    written: Counter[str] = Counter()
    with tarfile.open(archive) as files:
        names = {name: name.split("/") for name in files.getnames() if name.endswith(".png")}
        images = {parts[-1]: name for name, parts in names.items() if parts[-2:-1] == ["64"]}
        vendor = next(names[name][-3] for name in images.values())
        table = files.extractfile("package/emoji.json")
        assert table
        for row in json.load(table):
            if row["category"] in LEFT_OUT or row["image"] not in images:
                continue
            digest = int(hashlib.sha256(row["unified"].encode()).hexdigest(), 16)
            part = "train" if digest % TEST else "test"
            drawn = files.extractfile(images[row["image"]])
            assert drawn
            image = Image.open(io.BytesIO(drawn.read())).convert("RGBA")
            folder = out / part / row["category"].replace(" & ", "-").lower()
            folder.mkdir(parents=True, exist_ok=True)
            white = Image.new("RGBA", image.size, "white")
            Image.alpha_composite(white, image).convert("RGB").save(
                folder / f"{row['unified'].lower()}-{vendor}.png"
            )
            written[part] += 1
    return written


if __name__ == "__main__":
    total: Counter[str] = Counter()
    for archive in sys.argv[2:]:
        total += write(Path(archive), Path(sys.argv[1]))
    sys.stdout.write(f"{dict(total)} images in {sys.argv[1]}\n")
