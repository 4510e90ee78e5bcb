"""A front end without an engine: it says what it is told to say, token by token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import sensorium
from sensorium.config import EngineConfig, engine_config
from sensorium.engine.prompts.adapters import KnownAdapters
from sensorium.engine.prompts.types import ChatPrompt, Prompt
from sensorium.engine.stats import AdapterFacts, EngineStats
from sensorium.errors import ConfigError, EngineDeadError, InvalidRequestError, SensoriumError
from sensorium.models.embedder import GENERATES, Embedder
from sensorium.outputs import CompletionOutput, Logprob, PoolingRequestOutput, RequestOutput
from sensorium.params import PoolingParams, SamplingParams
from sensorium.text.detokenizer import Detokenizer
from sensorium.text.tokenizer import Tokenizer

DEMO = Path(sensorium.__file__).parent / "demo"
TOKENIZER = Tokenizer.from_folder(DEMO)


@dataclass
class Call:
    """One call of ``generate`` or ``embed``, and how far it came."""

    prompt: Prompt
    params: SamplingParams | PoolingParams
    request_id: str
    priority: int
    num_tokens: int = 0
    ended: bool = False


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` gives back."""

    text: str | None
    token_ids: tuple[int, ...]
    num_item_tokens: dict[str, int]


@dataclass
class FakeFrontend:
    """Answers with ``reply``.

    ``before`` and ``between`` run before the first and each further token; whatever they raise or
    wait for happens to the request.
    """

    reply: str = "Hello, world!"
    before: Callable[[Call], Any] | None = None
    between: Callable[[Call], Any] | None = None
    max_num_waiting: int = 64
    num_cached_tokens: int = 0
    warnings: tuple[str, ...] = ()
    default_params: dict[str, Any] = field(default_factory=dict)
    model_name: str = "demo"
    max_model_len: int = 4096
    modalities: tuple[str, ...] = ("image",)
    alive: bool = True
    metrics: Any = None
    embedder: Embedder | None = None
    calls: list[Call] = field(default_factory=list)
    closing: bool = False
    tokenizer: Tokenizer = TOKENIZER
    template_text: str = ""
    adapters: KnownAdapters = field(default_factory=KnownAdapters)
    transcription: Callable[[str | None], str] | None = None

    @property
    def config(self) -> EngineConfig:
        """Just what the server reads of it."""
        return engine_config(model=self.model_name, max_num_waiting=self.max_num_waiting)

    @property
    def input_processor(self) -> FakeFrontend:
        """Itself: it prepares prompts, too."""
        return self

    @property
    def num_open(self) -> int:
        """Calls whose generator has not been closed."""
        return sum(not call.ended for call in self.calls)

    async def prepare(self, prompt: Prompt) -> Prepared:
        """Tokenize; an image fills four positions."""
        if isinstance(prompt, ChatPrompt):
            text = "".join(m.text for m in prompt.conversation.messages)
            refs = prompt.conversation.refs
        else:
            text, refs = prompt.text, prompt.refs
        ids = prompt_ids(prompt) if text is None else self.tokenizer.encode(text)
        images = 4 * len(refs)
        return Prepared(text, (*ids, *[0] * images), {"image": images} if images else {})

    @property
    def runner(self) -> str:
        """What it does."""
        return "generate" if self.embedder is None else "pooling"

    def resolve_pooling(self, params: PoolingParams) -> PoolingParams:
        """Refuse what is refused."""
        if self.embedder is None:
            raise InvalidRequestError(GENERATES)
        return self.embedder.resolve(params)

    async def embed(
        self, prompt: Prompt, params: PoolingParams, *, request_id: str, priority: int = 0
    ) -> PoolingRequestOutput[np.ndarray]:
        """A vector that begins with the number of the prompt's tokens, and the sum of their ids."""
        call = Call(prompt, params, request_id, priority)
        self.calls.append(call)
        try:
            await self._happen(self.before, call)
            prepared = await self.prepare(prompt)
            vector = np.full(params.dimensions or 4, 0.25, np.float32)
            vector[:2] = len(prepared.token_ids), sum(prepared.token_ids)
            return PoolingRequestOutput(
                request_id,
                vector,
                list(prepared.token_ids),
                num_cached_tokens=self.num_cached_tokens,
                num_item_tokens=prepared.num_item_tokens,
            )
        finally:
            call.ended = True

    async def load_adapter(self, name: str, path: str) -> None:
        """Know one more adapter; a folder that is called so is damaged."""
        if Path(path).name == "damaged":
            raise ConfigError("its numbers are not finite")
        self.adapters.set([*self.adapters, AdapterFacts(name, path, name.encode(), 8)])

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter when no request uses it."""
        with self.adapters.retired(name):
            await self.adapters.unused(name)
            self.adapters.set([a for a in self.adapters if a.name != name])

    async def replica_stats(self) -> dict[str, EngineStats]:
        """Nothing, as there is one engine."""
        return {}

    async def stats(self) -> EngineStats:
        """Some numbers."""
        return EngineStats(
            num_running=self.num_open,
            kv_blocks_total=100,
            kv_blocks_used=25,
            prompt_tokens=70,
            generation_tokens=30,
            media={"fetch_count": 3.0, "decode_seconds": 1.5, "processor_cache_queries": 5.0},
        )

    def check_alive(self) -> None:
        """Raise while the engine is being restarted."""
        if not self.alive:
            error = EngineDeadError("The engine is being restarted.")
            error.retry_after = 7
            raise error

    async def shutdown(self) -> None:
        """All that runs ends with an error."""
        self.closing = True

    async def generate(
        self, prompt: Prompt, params: SamplingParams, *, request_id: str, priority: int = 0
    ) -> AsyncIterator[RequestOutput]:
        """The reply, one token of each sample per step."""
        call = Call(prompt, params, request_id, priority)
        self.calls.append(call)
        try:
            await self._happen(self.before, call)
            prepared = await self.prepare(prompt)
            output = self._output(prepared, params, request_id)
            output.warnings = self.warnings
            detokenizer = Detokenizer(self.tokenizer)
            ids = self.tokenizer.encode(self.reply)
            limit = len(ids) if params.max_tokens is None else min(len(ids), params.max_tokens)
            for position in range(limit):
                if position:
                    await self._happen(self.between, call)
                text = detokenizer.append([ids[position]])
                last = position == limit - 1
                for sample in output.outputs:
                    self._extend(sample, ids[position], text, params)
                    if last:
                        sample.finish_reason = "stop" if limit == len(ids) else "length"
                output.finished = last
                call.num_tokens += 1
                yield output
        finally:
            call.ended = True

    async def _happen(self, hook: Callable[[Call], Any] | None, call: Call) -> None:
        if hook is not None:
            result = hook(call)
            if asyncio.iscoroutine(result):
                await result
        if self.closing:
            raise EngineDeadError("The engine has stopped.")

    def _output(self, prepared: Prepared, params: SamplingParams, request_id: str) -> RequestOutput:
        wants = params.logprobs is not None
        samples = [
            CompletionOutput(i, "", [], 0.0 if wants else None, [] if wants else None)
            for i in range(params.n)
        ]
        ids = list(prepared.token_ids)
        output = RequestOutput(request_id, prepared.text, ids, samples, False)
        output.num_cached_tokens = self.num_cached_tokens
        output.num_item_tokens = prepared.num_item_tokens
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [
                None,
                *(alternatives(i, params.prompt_logprobs) for i in ids[1:]),
            ]
        return output

    def _extend(
        self, sample: CompletionOutput, token_id: int, text: str, params: SamplingParams
    ) -> None:
        sample.token_ids.append(token_id)
        sample.text += text
        if params.logprobs is not None and sample.logprobs is not None:
            sample.logprobs.append(alternatives(token_id, params.logprobs))


def alternatives(token_id: int, num: int) -> dict[int, Logprob]:
    """The chosen token on rank 2 (so that it is no alternative of one), and ``num`` others
    around it.
    """
    ranks = [rank for rank in range(1, num + 1) if rank != 2]
    others = {token_id + rank: Logprob(-float(rank), rank) for rank in ranks}
    return {token_id: Logprob(-2.0, 2), **others}


def prompt_ids(prompt: Any) -> Sequence[int]:
    """Ids of a raw prompt given as ids."""
    return prompt.token_ids or ()


def fail(error: SensoriumError | Exception) -> Callable[[Call], None]:
    """A hook that raises."""

    def hook(call: Call) -> None:
        raise error

    return hook


def hang(call: Call) -> Any:
    """A hook that waits for ever."""
    return asyncio.Event().wait()
