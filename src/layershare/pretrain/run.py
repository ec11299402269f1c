"""pretrain: text and a config, or a checkpoint, into a model folder with its tokenizer and a Result."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layershare.errors import ModelError, OptionError
from layershare.heal.callbacks import tell
from layershare.measure.brief import brief, result_of, timed
from layershare.plan import SharingPlan
from layershare.pretrain.config import PretrainConfig
from layershare.pretrain.start import OBJECTIVES, build, find_start, objective_for
from layershare.pretrain.text import blocks_of, described, tokenizer_for
from layershare.result import Result
from layershare.sharing import make_plan, plan_of, share
from layershare.store.open import new_folder
from layershare.tasks.corpus import read_corpus
from layershare.tasks.language import Guessing, Objective, Words, draws, guess_loss, judge, words_of
from layershare.train import in_plain_factors, train

WORK = "work"


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
    say = (lambda _: None) if quiet else tell
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
        with timed("tokenizer", seconds):
            start, words_from = tokenizer_for(start, tokenizer, corpus, objective, config, work, say)
        net = build(start, objective, words_from, config.seed)
        if plan is not None:
            net = share(net, _planned(net, plan, fresh=start.checkpoint is None))
        words, guessing = words_of(words_from, net.config), _guessing(config)
        objective.check(words, config.block_size, guessing)
        frame = objective.frame(words_from)
        with timed("tokens", seconds):
            blocks, judged = blocks_of(corpus, words_from, frame, config, work)
        say(f"pretrain: {blocks.tokens:,} tokens, {len(blocks):,} blocks of {config.block_size}")
        _probe(net, [blocks.block(0)], objective, words, guessing)
        with timed("judge before", seconds):
            before = brief("before", net, judge(net, judged, objective, words, guessing))
        say(f"held-out perplexity before: {before.metrics['perplexity']:.1f}")
        with timed("train", seconds), in_plain_factors(net):
            history = train(
                net, blocks, _Collator(objective, words, guessing, config.seed), _loss(objective, config),
                config, folder, resume=resume, quiet=quiet,
            )  # fmt: skip
        net.cpu()
        with timed("judge after", seconds):
            metrics = judge(net, judged, objective, words, guessing)
        say(f"held-out perplexity after: {metrics['perplexity']:.1f}")
        net.save_pretrained(folder)
        words_from.save_pretrained(folder)
        if (made := plan_of(net)) is not None:
            made.save(folder / "plan.toml")
        result = result_of(
            [before, brief("after", net, metrics, folder)],
            source=model if start.checkpoint is not None else start.name, task=objective.task, metric="perplexity",
            data=described(corpus, blocks, judged), seed=config.seed, settings=config, plan=made, history=history,
            seconds=seconds, threads=torch.get_num_threads(), notes=corpus.notes,
        )  # fmt: skip
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
        logits = objective.task.forward(model, objective.inputs(batch)).logits
        assert logits is not None
        return {"guess": guess_loss(logits, batch["labels"])}

    return compute_loss


def _guessing(config: PretrainConfig) -> Guessing:
    return Guessing(config.rate, config.mean_span, config.separate)


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
    try:
        with torch.no_grad():
            objective.task.forward(model, objective.inputs(batch))
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
