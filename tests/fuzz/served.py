"""A served model under fuzz: the process, requests to it, its memory."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from yarl import URL

from sensorium.models import loader
from sensorium.models.registry import resolve
from tests.e2e.serving import Server
from tests.fuzz.memory import Sample, take_sample
from tests.fuzz.requests import Sent, Target
from tests.fuzz.verdict import Answer

ANSWER_SECONDS = 120.0
"""After this the server has lost the request."""
FLAGS = (
    *("--enable-mm-embeds", "--disable-access-log", "--max-model-len", "1024"),
    *("--mm-processor-cache-gb", "0.02", "--mm-encoder-cache-gb", "0.02"),
    *("--max-body-bytes", str(16 << 20), "--kv-cache-memory-bytes", str(24 << 20)),
    *("--max-stored-files", "20", "--max-file-age", "2", "--max-batches", "4"),
)
"""Small caches, so that they are full when memory is first compared."""
UNCACHED = (
    *("--mm-processor-cache-gb", "0", "--mm-encoder-cache-gb", "0.001"),
    "--no-enable-prefix-caching",
)
"""Every item is decoded and encoded anew."""
VARIABLES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}
"""oneDNN, and torch's layer above it, keep what they made for the last 1024 shapes of matrices
if not told so."""

_SURPRISES = ("Traceback", "Warning:", " ERROR ")


@dataclass
class Served:
    """A running server of ``model``. Use as an asynchronous context."""

    model: str
    folder: Path
    flags: tuple[str, ...] = ()
    samples: list[Sample] = field(default_factory=list)

    async def __aenter__(self) -> Served:
        log = self.folder / f"{self.name}.log"
        flags = ("--served-model-name", self.name, *FLAGS, *self.flags)
        self.server = Server(self.model, log, flags, VARIABLES)
        self.started_at = time.monotonic()
        self._stack = AsyncExitStack()
        self._session = await self._stack.enter_async_context(
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS),
            )
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
        self.status = await asyncio.to_thread(self.server.stop)

    @property
    def name(self) -> str:
        """The model's, short."""
        return Path(self.model).name

    def surprises(self) -> list[str]:
        """Lines of the server's log about what nobody foresaw, or that a client can make appear
        at will.
        """
        lines = self.server.log.read_text(errors="replace").splitlines()
        return [line for line in lines if any(word in line for word in _SURPRISES)]

    @functools.cached_property
    def target(self) -> Target:
        """What a maker of requests needs to know."""
        loaded = loader.read_config(self.model)
        tokenizer = json.loads(Path(loaded.folder, "tokenizer.json").read_text())
        texts = tuple(token["content"] for token in tokenizer["added_tokens"])
        processor = resolve(loaded.config).build_processor(loaded)
        return Target(processor.modalities if processor is not None else (), texts)

    async def send(self, sent: Sent) -> Answer:
        """The answer to a request."""
        url = URL(self.server.url + sent.path, encoded=True)
        try:
            async with self._session.request(
                sent.method, url, data=sent.body, headers=sent.headers, allow_redirects=False
            ) as answer:
                headers = {name.lower(): value for name, value in answer.headers.items()}
                return Answer(answer.status, headers, await answer.read())
        except (aiohttp.ClientError, OSError) as error:
            return Answer(0, lost=f"{type(error).__name__}: {error}")
        except TimeoutError:
            return Answer(0, lost=f"nothing within {ANSWER_SECONDS:g} seconds")

    async def abandon(self, sent: Sent, seconds: float) -> None:
        """Send a request and close the connection after so many seconds, whatever has come by then."""
        try:
            async with asyncio.timeout(seconds):
                await self.send(sent)
        except TimeoutError:
            pass

    async def chat(self, *parts: Any, **fields: Any) -> Answer:
        """A greedy chat completion of a message of these parts."""
        messages = [{"role": "user", "content": list(parts)}]
        body = {"messages": messages, "temperature": 0, "max_tokens": 16, **fields}
        return await self.send(Sent("/v1/chat/completions", json.dumps(body).encode(), value=body))

    def sample(self) -> Sample:
        """Measure the server's processes now, and keep it in ``samples``."""
        seconds = time.monotonic() - self.started_at
        sample = take_sample(self.server.process.pid, seconds)
        self.samples.append(sample)
        return sample


def text_of(answer: Answer) -> str:
    """What the model said. Raises RuntimeError when there is no answer."""
    if answer.status != 200:
        raise RuntimeError(f"status {answer.status}: {answer.body[:300]!r}{answer.lost}")
    return str(json.loads(answer.body)["choices"][0]["message"]["content"])
