"""From text to blocks of tokens: a tokenizer, and the tokens on disk. Both are found again after an interruption."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from layershare import __version__
from layershare.errors import DataError, OptionError
from layershare.pretrain.config import VOCABULARY, PretrainConfig
from layershare.pretrain.start import Start
from layershare.pretrain.tokenizer import open_tokenizer, train_tokenizer
from layershare.result import write_atomic
from layershare.tasks.corpus import Corpus
from layershare.tasks.language import Objective
from layershare.tasks.packing import Frame, Packed, tokens_of, write_tokens


def tokenizer_for(
    start: Start, given: str | Path | None, corpus: Corpus, objective: Objective, config: PretrainConfig,
    work: Path, say: Callable[[str], None],
) -> tuple[Start, Any]:  # fmt: skip
    """The tokenizer given, the checkpoint's own, or one that is trained now (or was, before an interruption)."""
    source = given if given is not None else start.checkpoint
    if source is not None:
        if config.vocabulary:
            raise OptionError(
                "vocabulary is for a tokenizer that is trained.", "Leave it out, or the tokenizer."
            )
        return start, open_tokenizer(source)
    size, sentinels = config.vocabulary or start.vocabulary or VOCABULARY, start.config.is_encoder_decoder
    key = key_of(corpus, size, objective.tokenizer_kind, sentinels, config)
    folder, record = work / "tokenizer", work / "tokenizer.key"
    if not (record.is_file() and record.read_text(encoding="utf-8") == key):
        say(f"pretrain: training a tokenizer ({objective.tokenizer_kind}, {size} tokens)")
        made = train_tokenizer(
            corpus.stream("train"), objective.tokenizer_kind, size, sentinels=sentinels, length=start.length
        )
        made.save_pretrained(folder)
        write_atomic(record, key)
    return replace(start, vocabulary=None), open_tokenizer(folder)


def blocks_of(
    corpus: Corpus, tokenizer: Any, frame: Frame, config: PretrainConfig, work: Path
) -> tuple[Packed, list[list[int]]]:
    """The blocks to train on, in a file, and those to judge on."""
    assert frame.separator is not None
    if config.block_size < frame.size + 2:
        raise OptionError(f"block_size {config.block_size} leaves no room for text.")
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    key = key_of(corpus, vocabulary, config.block_size, frame.separator, config)
    packs = {}
    for part in ("train", "validation"):
        stream = tokens_of(tokenizer, corpus.stream(part), frame.separator)
        count = write_tokens(work / f"{part}.npy", stream, max(tokenizer.get_vocab().values()) + 1, key)
        packs[part] = Packed(work / f"{part}.npy", frame, config.block_size)
        if not len(packs[part]):
            raise DataError(
                f"The text for {part} has {count} tokens, fewer than one block of {config.block_size} takes.",
                "Give more text, smaller blocks, or more held-out text.",
            )
    judged = packs["validation"]
    return packs["train"], [judged.block(i) for i in range(min(len(judged), config.judged_blocks))]


def described(corpus: Corpus, blocks: Packed, judged: Sequence[Any]) -> dict[str, Any]:
    return {
        "files": dict(corpus.sha256),
        "sizes": dict(corpus.documents),
        "columns": dict(corpus.columns),
        "notes": list(corpus.notes),
        "tokens": blocks.tokens,
        "blocks": len(blocks),
        "judged_blocks": len(judged),
    }


def key_of(corpus: Corpus, *rest: Any) -> str:
    """A hash of the text as it is divided, and of whatever else decides."""
    *others, config = rest
    made_of = [__version__, dict(corpus.sha256), dict(corpus.columns), config.held_out, config.seed, *others]
    return hashlib.sha256(json.dumps([*made_of, dict(corpus.documents)], sort_keys=True).encode()).hexdigest()
