"""The serving example: answers are the runner's, requests are batched, bad ones are refused, stopping answers all."""

import asyncio
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx2")
pytest.importorskip("onnxscript")

import numpy as np
from fastapi.testclient import TestClient

from layershare.export import export
from layershare.onnx import load

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "serve"))
from app import Limits, make_app
from batching import Batcher, ClosedError, FullError

TEXTS = ["the cat sits on the mat", "a dog", "the man runs in the park"]


@pytest.fixture(scope="module")
def model(bert_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("served") / "onnx"
    export(bert_folder, out, "onnx")
    return out


@pytest.fixture
def client(model):
    with TestClient(make_app(str(model), Limits(max_body=2000, max_texts=4, max_chars=50, threads=1))) as one:
        yield one


def test_embeddings_are_the_runners(client, model):
    found = client.post("/encode", json={"texts": TEXTS})
    assert found.status_code == 200
    assert np.allclose(found.json()["embeddings"], load(model).encode(TEXTS), atol=1e-6)
    assert client.get("/health").json() == {
        "status": "ok", "kind": "encoder", "int8": False, "waiting": 0, "batches": 1, "texts": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/encode", {"texts": []}, 422, "texts: List should have at least 1 item"),
        ("/encode", {"texts": "a"}, 422, "texts: Input should be a valid list"),
        ("/encode", {"texts": [1]}, 422, "texts.0: Input should be a valid string"),
        ("/encode", {"texts": ["a"], "txets": 1}, 422, "txets: Extra inputs"),
        ("/encode", {"texts": ["a"] * 5}, 413, "5 texts: at most 4"),
        ("/encode", {"texts": ["a" * 51]}, 413, "text 0 has 51 characters: at most 50"),
        ("/encode", {"texts": ["a" * 3000]}, 413, "more than 2000 bytes"),
        ("/classify", {"texts": ["a"]}, 400, "has no labels"),
        ("/generate", {"texts": ["a"], "max_new_tokens": 1}, 400, "generates nothing"),
        ("/generate", {"texts": ["a"], "max_new_tokens": 999}, 413, "at most 256"),
        ("/generate", {"texts": ["a"], "max_new_tokens": 0}, 422, "max_new_tokens"),
    ],
)
def test_what_is_not_served_is_said(client, path, body, status, said):
    answer = client.post(path, json=body)
    assert (answer.status_code, said in answer.json()["error"]) == (status, True), answer.json()


def test_no_json_and_a_body_without_a_length(client):
    assert (
        client.post("/encode", content=b"{", headers={"content-type": "application/json"}).status_code == 422
    )
    chunks = (b"x" * 900 for _ in range(4))
    assert client.post("/encode", content=chunks).status_code == 413


class Slow:
    """Computes when it is let to; notes what came together."""

    def __init__(self):
        self.go, self.seen = threading.Event(), []

    def __call__(self, kind, texts):
        self.seen.append((kind, list(texts)))
        assert self.go.wait(5)
        if "bad" in texts:
            raise ValueError("bad")
        return [f"{kind}:{text}" for text in texts]


async def gathered(batcher, slow, *asked):
    """Answers of all that were asked while the first one was computed."""
    first = asyncio.create_task(batcher.submit("a", ["first"]))
    await asyncio.sleep(0.05)
    rest = [asyncio.create_task(batcher.submit(kind, texts)) for kind, texts in asked]
    await asyncio.sleep(0.05)
    slow.go.set()
    return await asyncio.gather(first, *rest, return_exceptions=True)


def test_those_who_wait_are_computed_together_by_kind_and_size():
    async def run():
        slow = Slow()
        batcher = Batcher(slow, most=3, waiting=100)
        asked = [("a", ["1"]), ("b", ["2"]), ("a", ["3", "4"]), ("a", ["5"])]
        found = await gathered(batcher, slow, *asked)
        await batcher.close()
        return slow.seen, found

    seen, found = asyncio.run(run())
    assert found == [["a:first"], ["a:1"], ["b:2"], ["a:3", "a:4"], ["a:5"]]
    assert seen == [("a", ["first"]), ("a", ["1", "3", "4"]), ("b", ["2"]), ("a", ["5"])]


def test_an_error_reaches_who_asked_and_nobody_behind_him():
    async def run():
        slow = Slow()
        batcher = Batcher(slow, most=1, waiting=100)
        found = await gathered(batcher, slow, ("a", ["bad"]), ("a", ["good"]))
        await batcher.close()
        return found

    first, bad, good = asyncio.run(run())
    assert (first, good) == (["a:first"], ["a:good"])
    assert isinstance(bad, ValueError)


def test_too_many_are_turned_away_and_who_goes_leaves_the_queue():
    async def run():
        slow = Slow()
        batcher = Batcher(slow, most=1, waiting=2)
        first = asyncio.create_task(batcher.submit("a", ["first"]))
        await asyncio.sleep(0.05)
        impatient = asyncio.create_task(batcher.submit("a", ["1", "2"]))
        await asyncio.sleep(0)
        with pytest.raises(FullError):
            await batcher.submit("a", ["3"])
        impatient.cancel()
        await asyncio.sleep(0)
        patient = asyncio.create_task(batcher.submit("a", ["3"]))
        await asyncio.sleep(0)
        slow.go.set()
        found = await asyncio.gather(first, patient)
        await batcher.close()
        return slow.seen, found

    seen, found = asyncio.run(run())
    assert found == [["a:first"], ["a:3"]]
    assert [texts for _, texts in seen] == [["first"], ["3"]]


def test_stopping_answers_all_that_wait_and_takes_nothing_new():
    async def run():
        slow = Slow()
        batcher = Batcher(slow, most=1, waiting=100)
        asked = [asyncio.create_task(batcher.submit("a", [str(i)])) for i in range(3)]
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0.01)
        with pytest.raises(ClosedError):
            await batcher.submit("a", ["late"])
        slow.go.set()
        await closing
        return await asyncio.gather(*asked)

    assert asyncio.run(run()) == [["a:0"], ["a:1"], ["a:2"]]
