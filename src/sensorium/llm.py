"""Offline use: ``LLM`` with ``generate`` and ``chat``. The engine runs in the caller's thread, media load in others."""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

from sensorium.config import EngineConfig, engine_config
from sensorium.engine.background import BackgroundLoop
from sensorium.engine.executor import build_engine
from sensorium.engine.prepare import Draft, PreparedPrompt, Preparer
from sensorium.engine.prompts import ChatPrompt, MediaOptions, Prompt, parse_prompt
from sensorium.engine.stats import EngineStats
from sensorium.engine.stream import RequestStream
from sensorium.errors import InvalidRequestError, SensoriumError
from sensorium.outputs import RequestOutput
from sensorium.params import SamplingParams
from sensorium.runtime.encoder import HeldFeatures
from sensorium.text.chat import parse_messages
from sensorium.text.tokenizer import Tokenizer

Value = TypeVar("Value")
Result = TypeVar("Result")
Params = SamplingParams | Sequence[SamplingParams] | None

AHEAD = 2
"""How many sequences are held at a time, media and all, running or on their way, as a multiple of those of a step."""


@dataclass(slots=True)
class _Job:
    """One prompt of a batch on its way to the engine."""

    index: int
    params: SamplingParams
    prepared: concurrent.futures.Future[PreparedPrompt]
    arrival_time: float


@dataclass(frozen=True, slots=True)
class _Batch:
    """What one call asks for. ``several``: the prompts were a list, so that errors name the prompt's index."""

    drafts: Sequence[Draft]
    params: Sequence[SamplingParams]
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
        self._streams: dict[str, tuple[int, RequestStream]] = {}

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
        several = isinstance(prompts, list | tuple) and not (
            prompts and isinstance(prompts[0], int)
        )
        values = prompts if several and isinstance(prompts, list | tuple) else [prompts]
        batch = self._batch(values, several, self._parse_prompt, sampling_params)
        return self._complete(batch, use_tqdm)

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
        return self._complete(self._batch(conversations, several, parse, sampling_params), use_tqdm)

    def chat_stream(
        self, messages: Sequence[Any], sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Answer one conversation, yielding the output (one object, updated in place) as it grows.

        Closing the generator ends the work.
        """
        batch = self._batch([messages], False, self._chat_prompt, sampling_params)
        with closing(self._run(batch)) as news:
            for _, output in news:
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

    def _chat_prompt(self, messages: Any, **options: Any) -> ChatPrompt:
        return ChatPrompt(conversation=parse_messages(messages), **options)

    def _batch(
        self,
        values: Sequence[Any],
        several: bool,
        parse: Callable[[Any], Prompt],
        sampling_params: Params,
    ) -> _Batch:
        """Check what was asked, as far as that goes without loading media."""
        self._check_open()
        params = self._params_list(sampling_params, len(values))
        for different in {id(one): one for one in params}.values():
            self._preparer.check_params(different)
        prompts = [_at(index, several, parse, value) for index, value in enumerate(values)]
        drafts = [
            _at(index, several, self._preparer.draft, prompt)
            for index, prompt in enumerate(prompts)
        ]
        return _Batch(drafts, params, several)

    def _params_list(self, params: Params, num_prompts: int) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * num_prompts
        if isinstance(params, str | Mapping) or not isinstance(params, Sequence):
            raise InvalidRequestError(
                "sampling_params must be a SamplingParams or a list of them, one per prompt; got "
                f"{type(params).__name__}.",
                param="sampling_params",
            )
        listed = list(params)
        if len(listed) != num_prompts:
            raise InvalidRequestError(
                f"There are {num_prompts} prompts, but {len(listed)} sampling_params: give one for "
                "all, or one per prompt.",
                param="sampling_params",
            )
        for index, value in enumerate(listed):
            if not isinstance(value, SamplingParams):
                raise InvalidRequestError(
                    f"sampling_params[{index}] must be a SamplingParams, got {type(value).__name__}.",
                    param="sampling_params",
                )
        return listed

    def _complete(self, batch: _Batch, use_tqdm: bool) -> list[RequestOutput]:
        num_prompts = len(batch.drafts)
        outputs: list[RequestOutput | None] = [None] * num_prompts
        with (
            _Progress(num_prompts, shown=use_tqdm) as progress,
            closing(self._run(batch)) as news,
        ):
            for index, output in news:
                if output.finished:
                    outputs[index] = output
                    progress.done(output)
        return [output for output in outputs if output is not None]

    def _run(self, batch: _Batch) -> Generator[tuple[int, RequestOutput], None, None]:
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
        params: Sequence[SamplingParams],
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
        prepared = job.prepared.result()
        request_id = str(next(self._request_numbers))
        requests = self._preparer.requests(prepared, job.params, request_id, 0, job.arrival_time)
        stream = RequestStream.for_requests(
            request_id, prepared, requests, job.params, self.get_tokenizer()
        )
        sources = tuple(HeldFeatures(item.features) for item in prepared.items)
        for request in requests:
            self._streams[request.request_id] = (job.index, stream)
            self._engine.add(request, sources)

    def _step(self, several: bool) -> list[tuple[int, RequestStream]]:
        """One step of the engine; the requests that have news."""
        if not self._engine.has_work:
            return []
        moved: dict[int, RequestStream] = {}
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


class _Progress:
    """A tqdm bar over requests with the rates of input and output tokens."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self._bar = tqdm(total=total, desc="Requests", disable=not shown, dynamic_ncols=True)
        self._start = time.monotonic()
        self._num_input = 0
        self._num_output = 0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def done(self, output: RequestOutput) -> None:
        """Count a finished request."""
        self._num_input += len(output.prompt_token_ids)
        self._num_output += sum(len(sample.token_ids) for sample in output.outputs)
        seconds = max(time.monotonic() - self._start, 1e-9)
        self._bar.set_postfix_str(
            f"input {self._num_input / seconds:.1f} tok/s, "
            f"output {self._num_output / seconds:.1f} tok/s",
            refresh=False,
        )
        self._bar.update()


def _at(index: int, several: bool, function: Callable[[Value], Result], value: Value) -> Result:
    """Call ``function``; an error of a prompt in a list says which one it is."""
    try:
        return function(value)
    except SensoriumError as error:
        if several:
            raise type(error)(f"Prompt {index}: {error.message}", param=error.param) from error
        raise
