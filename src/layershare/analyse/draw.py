"""Attention maps as one picture (SVG, nothing else needed to look at it)."""

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from torch import Tensor

from layershare.errors import OptionError

CELL, GAP, LEFT, TOP = 96, 14, 150, 40


def attention_svg(maps: Mapping[str, Tensor], tokens: Sequence[str], title: str = "") -> str:
    """A row of pictures for each layer, one for each head: darker where a token (row) looks more at another (column).

    ``maps``: name -> [heads, rows, columns], values from 0 to 1. The tokens stand at the first picture of each layer
    where there is room.
    """
    heads = max(len(one) for one in maps.values())
    width = LEFT + heads * (CELL + GAP)
    parts = [
        f'<text x="{GAP}" y="22" class="title">{escape(title)}</text>',
        *(f'<text x="{LEFT + h * (CELL + GAP)}" y="{TOP - 4}">head {h}</text>' for h in range(heads)),
    ]
    for row, (name, values) in enumerate(maps.items()):
        y = TOP + row * (CELL + GAP)
        parts.append(f'<text x="{GAP}" y="{y + 10}">{escape(name.replace("attentions.", "layer "))}</text>')
        high, wide = values.shape[1:]
        if high == wide == len(tokens) <= 16:
            step = CELL / high
            parts += [
                f'<text x="{LEFT - 4}" y="{y + (i + 0.7) * step:.1f}" class="token">{escape(token)}</text>'
                for i, token in enumerate(tokens)
            ]
        for head, one in enumerate(values):
            x = LEFT + head * (CELL + GAP)
            parts.append(
                f'<image x="{x}" y="{y}" width="{CELL}" height="{CELL}" preserveAspectRatio="none" '
                f'href="data:image/png;base64,{_png(one)}"/>'
            )
    height = TOP + len(maps) * (CELL + GAP)
    style = (
        "text{font:11px sans-serif;fill:#222}.title{font-size:14px}.token{font-size:7px;text-anchor:end}"
        "image{image-rendering:pixelated;outline:1px solid #ccc}"
    )
    start = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    return (
        f'{start}<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def save_attention(
    maps: Mapping[str, Tensor], tokens: Sequence[str], file: str | Path, title: str = ""
) -> None:
    """Write :func:`attention_svg` to ``file`` (.svg). Raises OptionError for another suffix, or without any map."""
    from layershare.result import write_atomic

    if Path(file).suffix != ".svg":
        raise OptionError(f"{file}: attention is drawn as .svg.")
    if not maps:
        raise OptionError(
            "The model gives no attention maps, so there is nothing to draw.", "Leave out --plot."
        )
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(Path(file), attention_svg(maps, tokens, title))


def _png(values: Tensor) -> str:
    """A map [rows, columns] of values from 0 (white) to 1 (dark blue) as PNG, in base64."""
    share = values.clamp(0, 1).float()[..., None]
    white, dark = share.new_tensor([255, 255, 255]), share.new_tensor([16, 44, 110])
    pixels = (white + share * (dark - white)).round().byte().contiguous()
    high, wide = values.shape
    raw = b"".join(
        b"\0" + bytes(row.flatten().tolist()) for row in pixels
    )  # each row begins with its filter: none

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", wide, high, 8, 2, 0, 0, 0)
    file = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )
    return base64.b64encode(file).decode()
