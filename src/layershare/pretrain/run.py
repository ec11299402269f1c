"""pretrain: text and a config, or a checkpoint, into a model folder with its tokenizer and a Result."""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from layershare import __version__
from layershare.errors import DataError, ModelError, OptionError
from layershare.measure.brief import brief
from layershare.measure.machine import machine
from layershare.plan import SharingPlan
from layershare.pretrain.start import OBJECTIVES, Start, build, find_start, objective_for
from layershare.pretrain.tokenizer import open_tokenizer, train_tokenizer
from layershare.result import Result, write_atomic
from layershare.sharing import make_plan, plan_of, share
from layershare.store.open import new_folder
from layershare.tasks.corpus import Corpus, read_corpus
from layershare.tasks.language import Guessing, Objective, Words, draws, guess_loss, judge, words_of
from layershare.tasks.packing import Frame, Packed, tokens_of, write_tokens
from layershare.train import TrainConfig, train

VOCABULARY = 8192
WORK = "work"


class PretrainConfig(TrainConfig):
    """How to pretrain: the fields of :class:`~layershare.train.TrainConfig` (a text is a block), and what to guess."""

    steps: int = Field(1000, ge=1, description="Optimizer steps.")
    batch_size: int = Field(32, ge=1, description="Blocks a step, over all devices together.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak of the learning rate (AdamW).")
    schedule: Literal["linear", "cosine"] = Field("cosine", description="How it falls to 0 after that.")
    adam_beta2: float = Field(0.98, gt=0, lt=1, description="Memory of squared gradients (AdamW).")
    objective: Literal["auto", "masked", "causal", "span"] = Field(
        "auto", description="masked tokens, the next token, left-out spans; auto: what suits the model."
    )
    block_size: int = Field(128, ge=8, description="Tokens in a block of packed text.")
    vocabulary: int = Field(
        0,
        ge=0,
        description="Tokens to train when no tokenizer is given; 0: the config's vocab_size, else 8192.",
    )
    rate: float = Field(0.15, gt=0, lt=1, description="Share of tokens that are masked or left out.")
    mean_span: float = Field(3.0, ge=1, description="Mean length of a left-out span.")
    separate: bool = Field(False, description="Keep attention inside each document (causal models).")
    held_out: float = Field(
        0.05, gt=0, lt=0.5, description="Share of the documents to judge on, without a file."
    )
    judged_blocks: int = Field(256, ge=1, description="At most so many held-out blocks are judged.")
    dropout: bool = Field(True, description="Whether the model trains with its dropout.")


def pretrain(
    model: str | Path,
    data: Sequence[str | Path] | str | Path,
    out: str | Path,
    *,
    validation: str | Path | None = None,
    tokenizer: str | Path | None = None,
    plan: SharingPlan | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    columns: Mapping[str, str] | None = None,
    config: PretrainConfig | None = None,
    resume: bool = True,
    quiet: bool = False,
) -> Result:
    """Train ``model`` to guess the text of ``data``, and save it as ``out``: weights, tokenizer, result.json.

    The files are read as streams; the tokens are kept on disk until training is done. Until then everything is in
    ``OUT.part``, and the same call goes on from the last checkpoint to the same weights.

    Args:
        model: a model type (``bert``) or a JSON file with a config, for fresh weights; or a checkpoint.
        data: plain text or tables with a text column, see :mod:`layershare.tasks.corpus`.
        validation: a file to judge on; default: ``config.held_out`` of the documents.
        tokenizer: a folder or hub name; default: the checkpoint's own, or one trained on the text (WordPiece for
            masked models, else byte-level BPE).
        plan: share from the start: a plan, or arguments for :func:`layershare.make_plan`, e.g. ``{"preset": "cycle",
            "unique": 2}``. Fresh layers are not averaged (that would shrink random weights): the first one is taken.
        overrides: keys of a fresh config with other values.
        columns: ``{"text": NAME}`` where the column is not found by its usual name.
        resume: go on from the last checkpoint; False begins anew.
        quiet: nothing on standard error.

    Returns:
        A Result with ``perplexity`` on held-out text before and after, also written as ``out/result.json``.

    Raises:
        OptionError, ModelError, DataError, PlanError: something given is wrong; before any training.
        StoreError: there is something in ``out``. TrainingError, KeyboardInterrupt: see
            :func:`layershare.train.train`.
    """
    config = config or PretrainConfig()
    say = (lambda _: None) if quiet else _say
    start = find_start(model, overrides)
    objective = OBJECTIVES[objective_for(start.config, config.objective)]
    if start.length is not None and config.block_size > start.length:
        raise OptionError(
            f"block_size {config.block_size} is more than the {start.length} tokens that {start.name} takes."
        )
    held = (1 - config.held_out, config.held_out, 0.0) if validation is None else (1.0, 0.0, 0.0)
    files = [] if validation is None else [validation]
    corpus = read_corpus(data, validation=files, columns=columns, split=held, seed=config.seed)
    seconds: dict[str, float] = {}
    with new_folder(out, resume=True) as folder:
        work = folder / WORK
        work.mkdir(exist_ok=True)
        with _timed("tokenizer", seconds):
            start, words_from = _tokenizer(start, tokenizer, corpus, objective, config, work, say)
        net = build(start, objective, words_from, config.seed)
        if plan is not None:
            net = share(net, _planned(net, plan, fresh=start.checkpoint is None))
        words, guessing = words_of(words_from, net.config), _guessing(config)
        objective.check(words, config.block_size, guessing)
        frame = objective.frame(words_from)
        with _timed("tokens", seconds):
            blocks, judged = _blocks(corpus, words_from, frame, config, work)
        say(f"pretrain: {blocks.tokens:,} tokens, {len(blocks):,} blocks of {config.block_size}")
        _probe(net, [blocks.block(0)], objective, words, guessing)
        with _timed("judge before", seconds):
            before = brief("before", net, judge(net, judged, objective, words, guessing))
        say(f"held-out perplexity before: {before.metrics['perplexity']:.1f}")
        with _timed("train", seconds):
            history = train(
                net, blocks, _Collator(objective, words, guessing, config.seed), _loss(objective, config),
                config, folder, resume=resume, quiet=quiet,
            )  # fmt: skip
        net.cpu()
        with _timed("judge after", seconds):
            metrics = judge(net, judged, objective, words, guessing)
        say(f"held-out perplexity after: {metrics['perplexity']:.1f}")
        net.save_pretrained(folder)
        words_from.save_pretrained(folder)
        if (made := plan_of(net)) is not None:
            made.save(folder / "plan.toml")
        result = Result(
            source=start.name,
            machine=machine(torch.get_num_threads()),
            task=objective.task.name,
            metric="perplexity",
            higher_is_better=False,
            data=_described(corpus, blocks, judged),
            seed=config.seed,
            command=" ".join(["layershare", *sys.argv[1:]]) if sys.argv[0].endswith("layershare") else "",
            models=[before, brief("after", net, metrics, folder)],
            plan=None if made is None else made.model_dump(mode="json"),
            plan_picture="" if made is None else made.picture(),
            history=history,
            seconds=seconds,
            notes=[*corpus.notes, f"Settings: {json.dumps(config.model_dump(mode='json'))}"],
        )
        result.save(folder / "result.json")
        shutil.rmtree(work)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return result


class _Collator:
    """Blocks -> a batch of the objective. What is masked follows from the seed and the place in the run."""

    def __init__(self, objective: Objective, words: Words, guessing: Guessing, seed: int) -> None:
        self._objective, self._words, self._guessing, self._seed = objective, words, guessing, seed

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        places = draws(self._seed + 1, (row["position"] for row in rows))
        blocks = [row["input_ids"] for row in rows]
        return self._objective.batch(blocks, places, self._words, self._guessing)


def _loss(
    objective: Objective, config: PretrainConfig
) -> Callable[[nn.Module, dict[str, Any]], dict[str, Tensor]]:
    def compute_loss(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        model.train(config.dropout)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = objective.task.forward(model, inputs).logits
        assert logits is not None
        return {"guess": guess_loss(logits, batch["labels"])}

    return compute_loss


def _guessing(config: PretrainConfig) -> Guessing:
    return Guessing(config.rate, config.mean_span, config.separate)


def _tokenizer(
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
    key = _key(corpus, size, objective.tokenizer_kind, sentinels, config)
    folder, record = work / "tokenizer", work / "tokenizer.key"
    if not (record.is_file() and record.read_text(encoding="utf-8") == key):
        say(f"pretrain: training a tokenizer ({objective.tokenizer_kind}, {size} tokens)")
        made = train_tokenizer(
            corpus.stream("train"), objective.tokenizer_kind, size, sentinels=sentinels, length=start.length
        )
        made.save_pretrained(folder)
        write_atomic(record, key)
    return replace(start, vocabulary=None), open_tokenizer(folder)


def _blocks(
    corpus: Corpus, tokenizer: Any, frame: Frame, config: PretrainConfig, work: Path
) -> tuple[Packed, list[list[int]]]:
    """The blocks to train on, in a file, and those to judge on."""
    assert frame.separator is not None
    if config.block_size < frame.size + 2:
        raise OptionError(f"block_size {config.block_size} leaves no room for text.")
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    key = _key(corpus, vocabulary, config.block_size, frame.separator, config)
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


def _planned(model: Any, plan: SharingPlan | Mapping[str, Any], *, fresh: bool) -> SharingPlan:
    """The plan, with the first layer in place of a mean where the layers are random."""
    made = plan if isinstance(plan, SharingPlan) else make_plan(model, **plan)
    if not fresh:
        return made
    first = {"merge": "first"}
    stacks = tuple(
        one.model_copy(
            update={
                "groups": tuple(
                    group.model_copy(update=first)
                    if group.method == "tie" and group.merge == "mean"
                    else group
                    for group in one.groups
                )
            }
        )
        for one in made.stacks
    )
    return made.model_copy(update={"stacks": stacks})


def _probe(
    model: Any, blocks: list[list[int]], objective: Objective, words: Words, guessing: Guessing
) -> None:
    """Run one block, so that one too long for the model, or attention that leaks, is told before training."""
    batch = objective.batch(blocks, draws(0, [0]), words, guessing)
    batch.pop("labels")
    try:
        with torch.no_grad():
            model(**batch)
    except (IndexError, RuntimeError) as error:
        why = " ".join(str(error).split())[:160]
        raise OptionError(
            f"The model does not take blocks of {len(blocks[0])} tokens ({why}).", "Lower block_size."
        ) from error
    except TypeError as error:
        raise ModelError(f"{type(model).__name__} does not take these inputs ({error}).") from error
    if guessing.separate:
        some = [t for t in blocks[0] if t != words.separator][:4]
        pair = torch.tensor([[*some, words.separator, *some]])
        places = torch.tensor([[*range(len(some) + 1), *range(len(some))]])
        with torch.no_grad():
            packed = objective.task.forward(model, {"input_ids": pair, "position_ids": places}).logits
            assert packed is not None
            together = packed[:, len(some) + 1 :]
            alone = model(input_ids=pair[:, len(some) + 1 :]).logits
        if not torch.allclose(together, alone, atol=1e-3):
            raise OptionError(
                f"{type(model).__name__} cannot keep documents of a block apart.", "Leave separate out."
            )


def _described(corpus: Corpus, blocks: Packed, judged: Sequence[Any]) -> dict[str, Any]:
    return {
        "files": dict(corpus.sha256),
        "sizes": dict(corpus.documents),
        "columns": dict(corpus.columns),
        "notes": list(corpus.notes),
        "tokens": blocks.tokens,
        "blocks": len(blocks),
        "judged_blocks": len(judged),
    }


def _key(corpus: Corpus, *rest: Any) -> str:
    """A hash of the text as it is divided, and of whatever else decides."""
    *others, config = rest
    made_of = [__version__, dict(corpus.sha256), dict(corpus.columns), config.held_out, config.seed, *others]
    return hashlib.sha256(json.dumps([*made_of, dict(corpus.documents)], sort_keys=True).encode()).hexdigest()


@contextmanager
def _timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - started, 1)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
