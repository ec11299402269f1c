"""exits: a classifier in; the same classifier with exits out, and what they are worth."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layershare.errors import DataError, ModelError, OptionError
from layershare.exits.config import ExitsConfig
from layershare.exits.curve import NEVER, POINTS, Answers, choose, point, times
from layershare.exits.fit import answers, candidates, fit, read
from layershare.exits.head import new_heads
from layershare.exits.model import EarlyExit
from layershare.exits.store import AUTO_CLASS, save
from layershare.exits.tail import Tail, find_tail
from layershare.measure.brief import brief, result_of, spread, timed
from layershare.measure.latency import quantile
from layershare.report.trade_off import picture
from layershare.result import Latency, Result, write_atomic
from layershare.sharing import plan_of
from layershare.store.open import copy_preprocessing, load_model, load_tokenizer, new_folder
from layershare.tasks import Data, Task, get_task
from layershare.tasks.classification import truth
from layershare.tasks.encoding import batches, encode, usable_length
from layershare.tasks.scores import METRICS

PICTURE, METRIC = "exits.svg", "accuracy"


def add_exits(
    model: str | Path,
    data: Sequence[str | Path] | str | Path,
    out: str | Path,
    *,
    task: str | Task = "text-classification",
    validation: str | Path | None = None,
    test: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    config: ExitsConfig | None = None,
) -> Result:
    """Give a classifier exits behind its earlier layers, and choose how sure they must be.

    Each exit gets a copy of the model's own head, trained on the texts (their labels are not needed) to say what the
    model says in the end; it reads what the last one reads or the mean of the tokens, whichever agrees more on the
    validation texts. The model's weights stay as they are, and so do its answers in full depth. The threshold is the
    least that loses at most ``max_loss`` of the metric on the validation split; quality and time are told of the test
    split.

    Args:
        model: a folder or hub name of a classifier with one label a text, shared or not.
        data, validation, test: files, see :mod:`layershare.tasks`; parts without a file are held out of ``data``.
        out: gets the model, its exits (see :func:`layershare.exits.load`), result.json and a picture.
        columns: role -> column where it is not found by its usual name.

    Returns:
        A Result of the model and of the model with exits, at batch 1; ``curve`` has every threshold that was told.

    Raises:
        OptionError, DataError, ModelError: something given is wrong. StoreError: there is something in ``out``.
    """
    config, kind = config or ExitsConfig(), get_task(task)
    if kind.auto_class != AUTO_CLASS:
        raise OptionError(f"Exits are for classifiers of whole texts, not for {kind.name}.")
    judged_on, tested_on = ([] if file is None else [file] for file in (validation, test))
    found = kind.read(data, validation=judged_on, test=tested_on, columns=columns, seed=config.seed)
    seconds: dict[str, float] = {}
    with new_folder(out) as folder:
        net, tokenizer = load_model(model, AUTO_CLASS), load_tokenizer(model)
        tail, texts = _checked(net, tokenizer, kind, found, config)
        positions = _positions(config.positions, tail.stack.length)
        net.save_pretrained(folder)
        precision, net = net.dtype, net.float()
        with timed("read", seconds):
            seen = {name: read(net, tail, positions, tokenizer, rows) for name, rows in texts.encoded.items()}
        trials = [
            new_heads(net, tail, dict.fromkeys(positions, pooling), config.seed)
            for pooling in candidates(tail)
        ]
        with timed("train", seconds):
            heads, history = fit(trials, seen["train"], seen["validation"], config)
        held, tested = (
            Answers(answers(heads, seen[name]), (*positions, tail.stack.length - 1))
            for name in ("validation", "test")
        )
        threshold = choose(held, texts.score("validation"), config.max_loss)
        with timed("time", seconds):
            count = len(texts.truth["test"])
            some = range(0, count, -(-count // config.timed))
            taken = times(EarlyExit(net, heads, threshold, tail), [texts.one("test", i) for i in some])
        timed_texts = Answers(tested.logits[:, some.start : some.stop : some.step], tested.positions)
        curve = [
            point(one, tested, texts.score("test"), timed_texts, taken) | {"chosen": one == threshold}
            for one in sorted({*tested.thresholds(POINTS), threshold, NEVER})
        ]
        save(folder, heads.to(precision), threshold, {"own_head": bool(tail.behind)})
        copy_preprocessing(model, folder)
        if (plan := plan_of(net)) is not None:
            plan.save(folder / "plan.toml")
        full = brief("full depth", net, texts.metrics("test", tested.said(NEVER)), folder)
        early = brief("with exits", EarlyExit(net, heads, threshold, tail), {}, folder).model_copy(
            update={"metrics": texts.metrics("test", tested.said(threshold))}
        )
        leaving = zip(taken, timed_texts.taken(threshold).tolist(), strict=True)
        chosen = next(one for one in curve if one["chosen"])
        result = result_of(
            [
                full.model_copy(update={"latency": [_latency([row[-1] for row in taken])]}),
                early.model_copy(update={"latency": [_latency([row[way] for row, way in leaving])]}),
            ],
            source=model, task=kind, metric=METRIC, data=found.describe(), seed=config.seed, settings=config,
            plan=plan, history=history, seconds=seconds, threads=torch.get_num_threads(),
            notes=[*found.notes, *_notes(chosen, tail, heads, texts, held, len(taken))],
        ).model_copy(update={"curve": curve})  # fmt: skip
        result.save(folder / "result.json")
        write_atomic(folder / PICTURE, picture(result))
    return result


@dataclass(frozen=True)
class _Texts:
    """Encoded texts by split, and the classes that are true of them; one class a text."""

    encoded: Mapping[str, Mapping[str, Sequence[Any]]]
    truth: Mapping[str, Sequence[int]]
    tokenizer: Any

    def metrics(self, split: str, said: list[int]) -> dict[str, float]:
        return METRICS["label"](self.truth[split], said)

    def score(self, split: str) -> Callable[[list[int]], float]:
        return lambda said: self.metrics(split, said)[METRIC]

    def one(self, split: str, row: int) -> dict[str, torch.Tensor]:
        """A batch of one text."""
        ((_, batch),) = batches(
            self.tokenizer, {name: column[row : row + 1] for name, column in self.encoded[split].items()}, 1
        )
        return batch


def _checked(net: Any, tokenizer: Any, kind: Task, found: Data, config: ExitsConfig) -> tuple[Tail, _Texts]:
    """What can be said before anything is computed."""
    problem = getattr(net.config, "problem_type", None)
    if problem not in (None, "single_label_classification") or net.config.num_labels < 2:
        what = (problem or "regression").replace("_", " ")
        raise ModelError(f"The model is for {what}: exits are for classifiers with one label a text.")
    if "label" not in found.columns:
        raise DataError("Exits are judged by labels.", "Give data with a column of labels, one a text.")
    if empty := next((name for name, part in found.splits.items() if not part), None):
        raise DataError(f"There are no {empty} texts.", "Give more data, or a file of them.")
    kind.check(found, net.config)
    length = usable_length(tokenizer, net.config, config.max_length)
    encoded, true = {}, {}
    for name, part in found.splits.items():
        part = spread(part, config.rows) if name == "train" else part
        assert part is not None
        sides = [part[side][:] for side in ("text", "text_pair") if side in part.column_names]
        encoded[name] = encode(tokenizer, sides[0], length, *sides[1:])
        true[name] = truth(part, net.config)
    return find_tail(net), _Texts(encoded, true, tokenizer)


def _positions(given: tuple[int, ...] | None, length: int) -> tuple[int, ...]:
    if given is None:
        return tuple(range(length - 1))
    if wrong := [p for p in given if not 0 <= p < length - 1]:
        raise OptionError(
            f"There can be no exit behind position {wrong[0]}.",
            f"The model has the positions 0 to {length - 1}, and the last one needs none.",
        )
    if not given:
        raise OptionError("positions names no exit.", "Leave it out for one behind each position.")
    return tuple(sorted(set(given)))


def _latency(taken: Sequence[float]) -> Latency:
    return Latency(batch=1, p50_ms=quantile(taken, 0.5), p95_ms=quantile(taken, 0.95), runs=len(taken))


def _notes(
    chosen: Mapping[str, Any], tail: Tail, heads: Any, texts: _Texts, held: Answers, count: int
) -> list[str]:  # fmt: skip
    threshold, score = chosen["threshold"], texts.score("validation")
    before, after = score(held.said(NEVER)), score(held.said(threshold))
    leave = ", ".join(f"{position}: {number}" for position, number in chosen["leave"].items())
    layers = f"{chosen['layers']:.2f} of {tail.stack.length} layers run, the mean over the test texts"
    pooled = ", ".join(f"{position}: {head.pooling}" for position, head in heads.items())
    made = "a copy of the model's head" if tail.behind else "a linear map"
    lost = f"{METRIC} {before:.4f} in full depth, {after:.4f} with exits"
    return [
        f"Each exit is {made}, trained; it reads behind position {pooled}."
        if threshold < NEVER
        else "No threshold kept the metric: the model runs in full depth.",
        f"Threshold {threshold:.4f}, chosen on {len(texts.truth['validation'])} validation texts ({lost}).",
        f"{layers}; left behind position {leave}.",
        f"{chosen['times_as_fast']:.2f} times as fast: the mean time of {count} texts, one by one, all ways in turns.",
    ]
