"""Offline use: ``LLM``. The engine runs in the caller's thread, media load in others."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch

from sensorium.config import EngineConfig, engine_config
from sensorium.engine.background import BackgroundLoop
from sensorium.engine.executor import build_engine
from sensorium.engine.pooling import PoolingStream, pooling_request, resolved
from sensorium.engine.prepare import Preparer
from sensorium.engine.prepared import Draft, PreparedPrompt
from sensorium.engine.progress import Progress
from sensorium.engine.prompts import (
    ChatPrompt,
    MediaOptions,
    Prompt,
    parse_conversation,
    parse_prompt,
)
from sensorium.engine.stats import EngineStats
from sensorium.engine.stream import RequestStream
from sensorium.errors import InvalidRequestError, SensoriumError
from sensorium.outputs import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
)
from sensorium.params import PoolingParams, SamplingParams
from sensorium.runtime.encoder import HeldFeatures
from sensorium.text.chat import parse_messages
from sensorium.text.tokenizer import Tokenizer

Value = TypeVar("Value")
Result = TypeVar("Result")
ParamsT = TypeVar("ParamsT", SamplingParams, PoolingParams)
Params = SamplingParams | Sequence[SamplingParams] | None
Pooling = PoolingParams | Sequence[PoolingParams] | None
Vector = PoolingRequestOutput[np.ndarray]

AHEAD = 2
"""How many sequences are held at a time, media and all, running or on their way, as a multiple of those of a step."""


@dataclass(slots=True)
class _Job:
    """One prompt of a batch on its way to the engine."""

    index: int
    params: SamplingParams | PoolingParams
    prepared: concurrent.futures.Future[PreparedPrompt]
    arrival_time: float


@dataclass(frozen=True, slots=True)
class _Batch:
    """What one call asks for. ``several``: the prompts were a list, so that errors name the prompt's index."""

    drafts: Sequence[Draft]
    params: Sequence[SamplingParams] | Sequence[PoolingParams]
    several: bool


class LLM:
    """A model that is run in this process. One call at a time: another one in the middle of it is refused.

    Keywords are the fields of ``sensorium.config``; an unknown one raises ConfigError with the nearest name. Use it as
    a context manager, or call ``close()``, to free its memory early.
    """

    def __init__(self, model: str, **keywords: Any) -> None:
        self.config: EngineConfig = engine_config(model=model, **keywords)
        self._preparer = Preparer(self.config, trust_request_chat_template=True)
        try:
            self._engine = build_engine(self.config)
        except BaseException:
            self._preparer.close()
            raise
        self._preparer.set_facts(self._engine.facts)
        self._loop = BackgroundLoop()
        self._in_use = threading.Lock()
        self._closed = False
        self._request_numbers = itertools.count()
        self._streams: dict[str, tuple[int, RequestStream | PoolingStream]] = {}

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop loading media, end the threads and free the model; nothing but another ``close`` may follow."""
        if not self._closed:
            self._closed = True
            self._loop.close()
            self._preparer.close()
            del self._engine

    def generate(
        self,
        prompts: object,
        sampling_params: Params = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete one prompt or a list of them; outputs in the order of the prompts.

        prompts: a string, a dict with ``prompt`` or ``prompt_token_ids`` and optionally ``multi_modal_data``,
        ``multi_modal_uuids``, ``mm_processor_kwargs`` and ``cache_salt``, or a list of these or of lists of token ids;
        a flat list of integers is one prompt. sampling_params: one for all, or one per prompt; the model's defaults
        when not given.

        A prompt that cannot be served raises RequestError with its index; wrong ones that can be told without loading
        media raise before anything runs.
        """
        values, several = _apart(prompts)
        params = self._sampling(sampling_params, len(values))
        batch = self._batch(values, several, self._parse_prompt, params)
        return self._texts(batch, use_tqdm)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of messages) or a list of conversations; outputs in their order.

        Messages are dicts as in OpenAI's API; content parts may be URLs, PIL images (``image_pil``) and, where enabled,
        embeddings. ``continue_final_message`` lets the model go on with the last message instead of answering it.
        """
        listed = isinstance(messages, list | tuple) and len(messages) > 0
        several = listed and not isinstance(messages[0], Mapping)

        def parse(conversation: Any) -> Prompt:
            return self._chat_prompt(
                conversation,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                tools=tuple(tools) if tools else None,
                chat_template_kwargs=chat_template_kwargs or {},
                media=MediaOptions(mm_processor_kwargs=mm_processor_kwargs or {}),
            )

        conversations = messages if several else [messages]
        params = self._sampling(sampling_params, len(conversations))
        return self._texts(self._batch(conversations, several, parse, params), use_tqdm)

    def embed(
        self, prompts: object, *, pooling_params: Pooling = None, use_tqdm: bool = True
    ) -> list[EmbeddingRequestOutput]:
        """The vector of one prompt or of each of a list, as lists of numbers in ``outputs.embedding``.

        prompts: as for ``generate``; or a dict with ``messages`` (and optionally ``add_generation_prompt``,
        ``continue_final_message``, ``chat_template``, ``chat_template_kwargs``, ``add_special_tokens``,
        ``mm_processor_kwargs`` and ``cache_salt``), which the chat template renders. pooling_params: one for all, or
        one per prompt. Errors are raised as by ``generate``.
        """
        return [
            EmbeddingRequestOutput(**_fields(output, EmbeddingOutput(output.outputs.tolist())))
            for output in self._vectors(prompts, pooling_params, use_tqdm)
        ]

    def encode(
        self,
        prompts: object,
        pooling_params: Pooling = None,
        use_tqdm: bool = True,
        *,
        pooling_task: str = "embed",
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """The same as ``embed``, with each vector as a tensor (dimensions,) float32 in ``outputs.data``."""
        if pooling_task != "embed":
            raise InvalidRequestError(
                f"pooling_task must be 'embed', got {pooling_task!r}.", param="pooling_task"
            )
        return [
            PoolingRequestOutput(**_fields(output, PoolingOutput(torch.from_numpy(output.outputs))))
            for output in self._vectors(prompts, pooling_params, use_tqdm)
        ]

    def chat_stream(
        self, messages: Sequence[Any], sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Answer one conversation, yielding the output (one object, updated in place) as it grows.

        Closing the generator ends the work.
        """
        params = self._sampling(sampling_params, 1)
        batch = self._batch([messages], False, self._chat_prompt, params)
        with closing(self._run(batch)) as news:
            for _, output in news:
                if isinstance(output, RequestOutput):
                    yield output

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._preparer.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The sampling values that the model's generation_config.json sets, ours where it has none."""
        return SamplingParams(**self._preparer.default_params)

    def stats(self) -> EngineStats:
        """Counters of the engine and of the media pipeline since the start."""
        self._check_open()
        stats = self._engine.stats()
        stats.media = self._preparer.media_stats()
        return stats

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidRequestError("This LLM has been closed; make a new one.")

    def _parse_prompt(self, value: object) -> Prompt:
        return parse_prompt(value, enable_mm_embeds=self.config.media.enable_mm_embeds)

    def _parse_input(self, value: object) -> Prompt:
        if isinstance(value, Mapping) and "messages" in value:
            return parse_conversation(value)
        return self._parse_prompt(value)

    def _chat_prompt(self, messages: Any, **options: Any) -> ChatPrompt:
        return ChatPrompt(conversation=parse_messages(messages), **options)

    def _batch(
        self,
        values: Sequence[Any],
        several: bool,
        parse: Callable[[Any], Prompt],
        params: Sequence[SamplingParams] | Sequence[PoolingParams],
    ) -> _Batch:
        """Check what was asked, as far as that goes without loading media."""
        prompts = [_at(index, several, parse, value) for index, value in enumerate(values)]
        drafts = [
            _at(index, several, self._preparer.draft, prompt)
            for index, prompt in enumerate(prompts)
        ]
        return _Batch(drafts, params, several)

    def _sampling(self, params: Params, num_prompts: int) -> list[SamplingParams]:
        """Sampling values for each prompt, checked."""
        self._check_open()
        given = self.get_default_sampling_params() if params is None else params
        listed = _listed(given, num_prompts, SamplingParams, "sampling_params")
        for different in {id(one): one for one in listed}.values():
            self._preparer.check_params(different)
        return listed

    def _vectors(self, prompts: object, params: Pooling, use_tqdm: bool) -> list[Vector]:
        """The vector of each prompt."""
        self._check_open()
        values, several = _apart(prompts)
        given = PoolingParams() if params is None else params
        listed = _listed(given, len(values), PoolingParams, "pooling_params")
        wanted = [resolved(self._preparer.embedder, one) for one in listed]
        batch = self._batch(values, several, self._parse_input, wanted)
        outputs = self._complete(batch, use_tqdm)
        return [output for output in outputs if isinstance(output, PoolingRequestOutput)]

    def _texts(self, batch: _Batch, use_tqdm: bool) -> list[RequestOutput]:
        outputs = self._complete(batch, use_tqdm)
        return [output for output in outputs if isinstance(output, RequestOutput)]

    def _complete(self, batch: _Batch, use_tqdm: bool) -> list[RequestOutput | Vector | None]:
        """The outputs of a batch when all are finished."""
        num_prompts = len(batch.drafts)
        outputs: list[RequestOutput | Vector | None] = [None] * num_prompts
        with (
            Progress(num_prompts, shown=use_tqdm) as progress,
            closing(self._run(batch)) as news,
        ):
            for index, output in news:
                if output.finished:
                    outputs[index] = output
                    progress.done(output)
        return outputs

    def _run(self, batch: _Batch) -> Generator[tuple[int, RequestOutput | Vector], None, None]:
        """Run a batch and yield (index, output) whenever there are news; ends all work when left early."""
        if not self._in_use.acquire(blocking=False):
            raise InvalidRequestError(
                "This LLM is in the middle of another call: exhaust or close the stream that chat_stream returned, "
                "or wait for the other thread."
            )
        todo = deque(enumerate(batch.drafts))
        ready: deque[_Job] = deque()
        try:
            while todo or ready or self._streams:
                self._prepare_ahead(todo, ready, batch.params)
                self._admit(ready, batch.several)
                for index, stream in self._step(batch.several):
                    yield index, stream.output
        except (SensoriumError, GeneratorExit):
            raise
        except BaseException:
            # An interrupt may come in the middle of a step or of any bookkeeping.
            self._engine.reset()
            raise
        finally:
            for job in ready:
                job.prepared.cancel()
            for engine_id in self._streams:
                self._engine.abort(engine_id)
            self._streams.clear()
            self._in_use.release()

    def _prepare_ahead(
        self,
        todo: deque[tuple[int, Draft]],
        ready: deque[_Job],
        params: Sequence[SamplingParams] | Sequence[PoolingParams],
    ) -> None:
        """Keep enough prompts in preparation that the engine need not wait, and no more."""
        most = AHEAD * self.config.scheduler.max_num_seqs
        while todo and len(ready) + len(self._streams) < most:
            index, draft = todo.popleft()
            future = self._loop.submit(self._preparer.complete(draft))
            ready.append(_Job(index, params[index], future, time.monotonic()))

    def _admit(self, ready: deque[_Job], several: bool) -> None:
        """Give the engine what is prepared, in order; wait only when it has nothing else to do."""
        while ready:
            job = ready[0]
            if not job.prepared.done() and self._engine.has_work:
                return
            _at(job.index, several, self._start, job)
            ready.popleft()

    def _start(self, job: _Job) -> None:
        prepared, params = job.prepared.result(), job.params
        request_id = str(next(self._request_numbers))
        stream: RequestStream | PoolingStream
        if isinstance(params, PoolingParams):
            requests = [pooling_request(prepared, params, request_id, 0, job.arrival_time)]
            stream = PoolingStream(request_id, prepared, requests[0])
        else:
            requests = self._preparer.requests(prepared, params, request_id, 0, job.arrival_time)
            stream = RequestStream.for_requests(
                request_id, prepared, requests, params, self.get_tokenizer()
            )
        sources = tuple(HeldFeatures(item.features) for item in prepared.items)
        for request in requests:
            self._streams[request.request_id] = (job.index, stream)
            self._engine.add(request, sources)

    def _step(self, several: bool) -> list[tuple[int, RequestStream | PoolingStream]]:
        """One step of the engine; the requests that have news."""
        if not self._engine.has_work:
            return []
        moved: dict[int, RequestStream | PoolingStream] = {}
        for update in self._engine.step():
            entry = self._streams.get(update.request_id)
            if entry is None:
                continue
            index, stream = entry
            if _at(index, several, stream.accept, update):
                self._engine.abort(update.request_id)
                del self._streams[update.request_id]
            elif update.finish_reason is not None:
                del self._streams[update.request_id]
            moved[index] = stream
        return list(moved.items())


def _apart(prompts: object) -> tuple[Sequence[Any], bool]:
    """The prompts of an argument that is one of them or a list; whether it is a list."""
    if isinstance(prompts, list | tuple) and not (prompts and isinstance(prompts[0], int)):
        return prompts, True
    return [prompts], False


def _listed(params: object, num_prompts: int, kind: type[ParamsT], name: str) -> list[ParamsT]:
    """One ``kind`` for each prompt, of an argument that is one for all or a list. Raises InvalidRequestError."""
    if isinstance(params, kind):
        return [params] * num_prompts
    if isinstance(params, str | Mapping) or not isinstance(params, Sequence):
        raise InvalidRequestError(
            f"{name} must be a {kind.__name__} or a list of them, one per prompt; got {type(params).__name__}.",
            param=name,
        )
    listed = list(params)
    if len(listed) != num_prompts:
        raise InvalidRequestError(
            f"There are {num_prompts} prompts, but {len(listed)} {name}: give one for all, or one per prompt.",
            param=name,
        )
    for index, value in enumerate(listed):
        if not isinstance(value, kind):
            raise InvalidRequestError(
                f"{name}[{index}] must be a {kind.__name__}, got {type(value).__name__}.",
                param=name,
            )
    return listed


def _fields(output: Vector, outputs: object) -> dict[str, Any]:
    """The fields of an output with its vector in another form."""
    known = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
    return {**known, "outputs": outputs}


def _at(index: int, several: bool, function: Callable[[Value], Result], value: Value) -> Result:
    """Call ``function``; an error of a prompt in a list says which one it is."""
    try:
        return function(value)
    except SensoriumError as error:
        if several:
            raise type(error)(f"Prompt {index}: {error.message}", param=error.param) from error
        raise
