"""Offline use: ``LLM``. The engine runs in the caller's thread; media load in other threads and in processes."""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any, cast

import numpy as np
import torch

from sensorium.config import EngineConfig, engine_config
from sensorium.engine.background import BackgroundLoop
from sensorium.engine.batch import (
    Batch,
    Job,
    Result,
    apart,
    at_prompt,
    batched,
    distinct,
    fields_with,
    listed,
)
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
from sensorium.text.chat import parse_messages
from sensorium.text.tokenizer import Tokenizer

Params = SamplingParams | Sequence[SamplingParams] | None
Pooling = PoolingParams | Sequence[PoolingParams] | None
Vector = PoolingRequestOutput[np.ndarray]
Output = RequestOutput | Vector

COMPILED_AT_ONCE = 64
"""Constraints that are given to the helper at a time, which lets none wait for long."""

AHEAD = 2
"""How many sequences are held at a time, media and all, running or on their way, as a multiple of those of a step."""


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
        self._dirty = False
        self._request_numbers = itertools.count()
        self._streams: dict[str, tuple[int, RequestStream | PoolingStream]] = {}

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop loading media, end threads and processes, free the model; nothing but another ``close`` may follow."""
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
        media raise before anything runs. When one turns out wrong later, such as a file that is no image, no more are
        started, those before it are finished, and the error is raised with what is complete: ``error.outputs`` has the
        outputs at their places and None at the others, ``error.index`` is the place of the prompt. The LLM can be used
        on.
        """
        values, several = apart(prompts)
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
        return self._vectors(
            prompts,
            pooling_params,
            use_tqdm,
            lambda output: EmbeddingRequestOutput(
                **fields_with(output, EmbeddingOutput(output.outputs.tolist()))
            ),
        )

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
        return self._vectors(
            prompts,
            pooling_params,
            use_tqdm,
            lambda output: PoolingRequestOutput(
                **fields_with(output, PoolingOutput(torch.from_numpy(output.outputs)))
            ),
        )

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
    ) -> Batch:
        """Check what was asked, as far as that goes without loading media."""
        prompts = [at_prompt(index, several, parse, value) for index, value in enumerate(values)]
        drafts = [
            at_prompt(index, several, self._preparer.draft, prompt)
            for index, prompt in enumerate(prompts)
        ]
        return Batch(drafts, params, several)

    def _sampling(self, params: Params, num_prompts: int) -> list[SamplingParams]:
        """Sampling values for each prompt, checked."""
        self._check_open()
        given = self.get_default_sampling_params() if params is None else params
        for_each = listed(given, num_prompts, SamplingParams, "sampling_params")
        several = not isinstance(given, SamplingParams)
        different = distinct(for_each)
        for index, one in different:
            at_prompt(index, several, self._preparer.check_params, one)
        constrained = [(index, one) for index, one in different if one.structured_outputs]
        for some in batched(constrained, COMPILED_AT_ONCE):
            compiled = [self._loop.submit(self._preparer.grammar(one)) for _, one in some]
            concurrent.futures.wait(compiled)
            for (index, _), grammar in zip(some, compiled, strict=True):
                at_prompt(index, several, lambda done: done.result(), grammar)
        return for_each

    def _vectors(
        self, prompts: object, params: Pooling, use_tqdm: bool, form: Callable[[Vector], Result]
    ) -> list[Result]:
        """The vector of each prompt, in the form that callers get."""
        self._check_open()
        values, several = apart(prompts)
        given = PoolingParams() if params is None else params
        for_each = listed(given, len(values), PoolingParams, "pooling_params")
        wanted = [resolved(self._preparer.embedder, one) for one in for_each]
        batch = self._batch(values, several, self._parse_input, wanted)
        return self._complete(batch, use_tqdm, cast("Callable[[Output], Result]", form))

    def _texts(self, batch: Batch, use_tqdm: bool) -> list[RequestOutput]:
        return self._complete(batch, use_tqdm, lambda output: cast("RequestOutput", output))

    def _complete(
        self, batch: Batch, use_tqdm: bool, form: Callable[[Output], Result]
    ) -> list[Result]:
        """The outputs of a batch when all are finished; an error carries those that are."""
        outputs: list[Result | None] = [None] * len(batch.drafts)
        try:
            for index, output in self._finished(batch, use_tqdm):
                outputs[index] = form(output)
        except SensoriumError as error:
            error.outputs = outputs
            raise
        return cast("list[Result]", outputs)

    def _finished(self, batch: Batch, use_tqdm: bool) -> Generator[tuple[int, Output], None, None]:
        """Run a batch and yield (index, output) of each prompt when it is complete."""
        with (
            Progress(len(batch.drafts), shown=use_tqdm) as progress,
            closing(self._run(batch)) as news,
        ):
            for index, output in news:
                if output.finished:
                    progress.done(output)
                    yield index, output

    def _run(self, batch: Batch) -> Generator[tuple[int, Output], None, None]:
        """Run a batch and yield (index, output) whenever there are news; ends all work when left early.

        After an error of one prompt no more are started; those that were are finished, and then it is raised.
        """
        if not self._in_use.acquire(blocking=False):
            raise InvalidRequestError(
                "This LLM is in the middle of another call: exhaust or close the stream that chat_stream returned, "
                "or wait for the other thread."
            )
        try:
            yield from self._run_alone(batch)
        finally:
            self._in_use.release()

    def _run_alone(self, batch: Batch) -> Generator[tuple[int, Output], None, None]:
        if self._dirty:  # a second interrupt came while the first one was cleaned up after
            self._clean_up((), whole=False)
        self._dirty = True
        todo = deque(enumerate(batch.drafts))
        ready: deque[Job] = deque()
        errors: list[SensoriumError] = []
        whole = False
        try:
            while self._streams or (not errors and (todo or ready)):
                if not errors:
                    self._prepare_ahead(todo, ready, batch.params)
                    self._admit(ready, batch.several, errors)
                for index, stream in self._step(batch.several, errors):
                    yield index, stream.output
            if errors:
                raise errors[0]
            whole = True
        except (SensoriumError, GeneratorExit):
            whole = True
            raise
        finally:
            self._clean_up(ready, whole=whole)

    def _clean_up(self, ready: Iterable[Job], *, whole: bool) -> None:
        """End what is left of a call. Not ``whole``: an interrupt came in the middle of a step, or of any
        bookkeeping."""
        for job in ready:
            job.prepared.cancel()
        if not whole:
            self._engine.reset()
        for engine_id in self._streams:
            self._engine.abort(engine_id)
        self._streams.clear()
        self._dirty = False

    def _prepare_ahead(
        self,
        todo: deque[tuple[int, Draft]],
        ready: deque[Job],
        params: Sequence[SamplingParams] | Sequence[PoolingParams],
    ) -> None:
        """Keep enough prompts in preparation that the engine need not wait, and no more."""
        most = AHEAD * self.config.scheduler.max_num_seqs
        while todo and len(ready) + len(self._streams) < most:
            index, draft = todo.popleft()
            future = self._loop.submit(self._ready(draft, params[index]))
            ready.append(Job(index, params[index], future, time.monotonic()))

    async def _ready(
        self, draft: Draft, params: SamplingParams | PoolingParams
    ) -> tuple[PreparedPrompt, str | None]:
        """A prompt with its media, and the grammar of its constraint."""
        if isinstance(params, PoolingParams):
            return await self._preparer.complete(draft), None
        grammar = await self._preparer.grammar(params)
        return await self._preparer.complete(draft), grammar

    def _admit(self, ready: deque[Job], several: bool, errors: list[SensoriumError]) -> None:
        """Give the engine what is prepared, in order; wait only when it has nothing else to do."""
        while ready and not errors:
            job = ready[0]
            if not job.prepared.done() and self._engine.has_work:
                return
            ready.popleft()
            try:
                at_prompt(job.index, several, self._start, job)
            except SensoriumError as error:
                self._drop(job.index)
                errors.append(error)

    def _start(self, job: Job) -> None:
        (prepared, grammar), params = job.prepared.result(), job.params
        request_id = str(next(self._request_numbers))
        stream: RequestStream | PoolingStream
        if isinstance(params, PoolingParams):
            requests = [pooling_request(prepared, params, request_id, 0, job.arrival_time)]
            stream = PoolingStream(request_id, prepared, requests[0])
        else:
            requests = self._preparer.requests(
                prepared, params, request_id, 0, job.arrival_time, grammar
            )
            stream = RequestStream.for_requests(
                request_id, prepared, requests, params, self.get_tokenizer()
            )
        features = tuple(item.features for item in prepared.items)
        for request in requests:
            self._streams[request.request_id] = (job.index, stream)
            self._engine.add(request, features)

    def _drop(self, index: int) -> None:
        """End what runs for a prompt."""
        for engine_id in [i for i, (owner, _) in self._streams.items() if owner == index]:
            self._engine.abort(engine_id)
            del self._streams[engine_id]

    def _step(
        self, several: bool, errors: list[SensoriumError]
    ) -> list[tuple[int, RequestStream | PoolingStream]]:
        """One step of the engine; the requests that have news, those that failed left out."""
        if not self._engine.has_work:
            return []
        moved: dict[int, RequestStream | PoolingStream] = {}
        for update in self._engine.step():
            entry = self._streams.get(update.request_id)
            if entry is None:
                continue
            index, stream = entry
            try:
                stopped = at_prompt(index, several, stream.accept, update)
            except SensoriumError as error:
                self._drop(index)
                moved.pop(index, None)
                errors.append(error)
                continue
            if stopped:
                self._engine.abort(update.request_id)
            if stopped or update.finish_reason is not None:
                del self._streams[update.request_id]
            moved[index] = stream
        return list(moved.items())
