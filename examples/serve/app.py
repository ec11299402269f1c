"""An HTTP service over an exported model: embeddings, labels or texts, whichever the model gives.

    MODEL=shared-onnx uvicorn --app-dir examples/serve app:app --port 8000
    curl -s localhost:8000/encode -H 'content-type: application/json' -d '{"texts": ["a text", "another"]}'

Settings are environment variables, see :class:`Limits`. Needs no torch: numpy, tokenizers, onnxruntime, FastAPI.
"""

import os
from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from typing import Any

from batching import Batcher, ClosedError, FullError
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from layershare.errors import OptionError
from layershare.onnx import Runner, load


@dataclass(frozen=True)
class Limits:
    """What a request may ask for, and how it is computed. Each is also an environment variable, in capitals."""

    max_body: int = 1_000_000
    """Bytes of a request."""
    max_texts: int = 64
    """Texts of a request."""
    max_chars: int = 20_000
    """Characters of a text; of its tokens the model reads as many as it can."""
    max_new: int = 256
    """Tokens that a request may ask to generate."""
    max_batch: int = 32
    """Texts computed together."""
    max_waiting: int = 1024
    """Texts that wait; beyond that requests are turned away with 503."""
    wait_ms: int = 0
    """How long a request is held back so that others can join it."""
    threads: int = 0
    """Compute threads; 0: all cores."""

    @classmethod
    def from_environment(cls) -> "Limits":
        found = {}
        for one in fields(cls):
            said = os.environ.get(one.name.upper())
            if said is not None:
                if not said.isdecimal():
                    raise SystemExit(f"{one.name.upper()}={said}: a whole number is wanted.")
                found[one.name] = int(said)
        return cls(**found)


class Texts(BaseModel):
    model_config = ConfigDict(extra="forbid")
    texts: list[str] = Field(min_length=1)


class Prompts(Texts):
    max_new_tokens: int = Field(20, ge=1)


class RefusedError(Exception):
    """A request that is not served: its status and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        self.status, self.reason = status, reason


def make_app(folder: str, limits: Limits | None = None) -> FastAPI:
    """The service of the export in ``folder``, which is opened when the service starts."""
    limits = limits or Limits()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        runner = load(folder, threads=limits.threads or None)
        app.state.runner = runner
        app.state.batcher = Batcher(
            lambda kind, texts: compute(runner, kind, texts, limits.max_batch),
            most=limits.max_batch, waiting=limits.max_waiting, wait=limits.wait_ms / 1000,
        )  # fmt: skip
        yield
        await app.state.batcher.close()  # all that were taken in are answered

    app = FastAPI(title="layershare", lifespan=lifespan)
    app.add_middleware(BodyLimit, most=limits.max_body)

    async def answer(kind: Hashable, texts: list[str]) -> list[Any]:
        if len(texts) > limits.max_texts:
            raise RefusedError(413, f"{len(texts)} texts: at most {limits.max_texts} a request.")
        for number, text in enumerate(texts):
            if len(text) > limits.max_chars:
                raise RefusedError(
                    413, f"text {number} has {len(text)} characters: at most {limits.max_chars}."
                )
        try:
            return await app.state.batcher.submit(kind, texts)
        except FullError:
            raise RefusedError(503, f"{limits.max_waiting} texts wait already: try again later.") from None
        except ClosedError:
            raise RefusedError(503, "the service is stopping.") from None
        except OptionError as error:
            raise RefusedError(400, str(error)) from None

    @app.get("/health")
    async def health() -> dict[str, Any]:
        runner, batcher = app.state.runner, app.state.batcher
        return {"status": "ok", "kind": runner.kind, "int8": runner.int8, "waiting": batcher.waiting,
                "batches": batcher.batches, "texts": batcher.texts}  # fmt: skip

    @app.post("/encode")
    async def encode(asked: Texts) -> dict[str, list[list[float]]]:
        return {"embeddings": await answer("encode", asked.texts)}

    @app.post("/classify")
    async def classify(asked: Texts) -> dict[str, list[dict[str, Any]]]:
        found = await answer("classify", asked.texts)
        return {"labels": [{"label": label, "probability": odds} for label, odds in found]}

    @app.post("/generate")
    async def generate(asked: Prompts) -> dict[str, list[str]]:
        if asked.max_new_tokens > limits.max_new:
            raise RefusedError(413, f"max_new_tokens = {asked.max_new_tokens}: at most {limits.max_new}.")
        return {"texts": await answer(("generate", asked.max_new_tokens), asked.texts)}

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> JSONResponse:
        headers = {"retry-after": "1"} if error.status == 503 else None
        return JSONResponse({"error": error.reason}, error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"] if step != "body")
        return JSONResponse({"error": f"{where}: {first['msg']}".removeprefix(": ")}, 422)

    return app


def compute(runner: Runner, kind: Hashable, texts: list[str], batch_size: int) -> Sequence[Any]:
    """The answers of one batch."""
    if kind == "encode":
        return runner.encode(texts, batch_size=batch_size).tolist()
    if kind == "classify":
        return runner.classify(texts, batch_size=batch_size)
    _, new = kind  # type: ignore[misc]
    return runner.generate(texts, max_new_tokens=new)


class BodyLimit:
    """Turns away bodies of more than ``most`` bytes, before they are read into memory."""

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        read, chunks, more = int(dict(scope["headers"]).get(b"content-length", b"0")), [], True
        if read <= self.most:  # what it says; now what it has
            read = 0
        while more and read <= self.most:
            message = await receive()
            if message["type"] != "http.request":
                return None
            chunks.append(message.get("body", b""))
            read, more = read + len(chunks[-1]), message.get("more_body", False)
        if read > self.most:
            answer = JSONResponse({"error": f"the request has more than {self.most} bytes."}, 413)
            return await answer(scope, receive, send)
        whole = [{"type": "http.request", "body": b"".join(chunks), "more_body": False}]
        return await self.app(scope, lambda: _first(whole, receive), send)


async def _first(whole: list, receive: Any) -> Any:
    return whole.pop() if whole else await receive()


def __getattr__(name: str) -> FastAPI:
    """``app:app`` for uvicorn; made when it is asked for, so that tests can import the rest."""
    if name != "app":
        raise AttributeError(name)
    if not (folder := os.environ.get("MODEL")):
        raise SystemExit("Set MODEL to a folder that layershare export --format onnx wrote.")
    return make_app(folder, Limits.from_environment())
