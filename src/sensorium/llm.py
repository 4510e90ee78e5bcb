"""The offline ``LLM``: the engine runs in the caller's thread, media load in threads and processes."""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Literal, cast, overload

from sensorium import forks
from sensorium.compat.calls import takes_call_keywords
from sensorium.config import EngineConfig, engine_config
from sensorium.engine.engine import Engine
from sensorium.engine.executor import build_engine
from sensorium.engine.offline.batch import (
    Batch,
    BatchPrompt,
    Result,
    apart,
    as_embedding,
    as_tensor,
    at_prompt,
    batched,
    conversations,
    distinct,
    each_with,
    is_read_late,
    listed,
    prioritized,
    unchanged,
)
from sensorium.engine.offline.progress import Progress
from sensorium.engine.offline.run import BatchRun, Output
from sensorium.engine.outputs.pooling import resolved
from sensorium.engine.prompts.input_processor import InputProcessor
from sensorium.engine.prompts.types import Prompt, chat_prompt, parse_input, parse_prompt
from sensorium.engine.stats import EngineStats
from sensorium.errors import InvalidRequestError, SensoriumError
from sensorium.multimodal.workers.event_loop import LoopThread
from sensorium.outputs import (
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
)
from sensorium.params import PoolingParams, SamplingParams
from sensorium.text.tokenizer import Tokenizer
from sensorium.tracing import Tracer

Params = SamplingParams | Iterable[SamplingParams] | None
Pooling = PoolingParams | Iterable[PoolingParams] | None

COMPILED_AT_ONCE = 64
"""Constraints that are given to the helper at a time, which lets none wait for long."""


class LLM:
    """A model that runs in this process.

    One call runs at a time: a second one in the middle of it is refused. Use it as a context
    manager, or call ``close()``, to free its memory early; one that nobody holds any more frees its
    threads, processes and descriptors by itself. A forked process cannot use it: make it in the
    process that uses it, and start that by "spawn" once a model has run here.

    Args:
        model: Hugging Face id, local folder, "demo" or "demo-audio".
        **keywords: Engine options, as the page "Configuration" lists them.

    Raises:
        ConfigError: An option is wrong or unknown, or the model cannot be loaded.
        ForkedProcessError: The process was forked after a model has run.
    """

    def __init__(self, model: str, **keywords: Any) -> None:
        config = engine_config(model=model, **keywords)
        forks.begin_computing()
        tracer = Tracer(config.observability.trace_dir)
        input_processor = InputProcessor(
            config, trust_request_chat_template=True, package_files=True
        )
        try:
            engine = build_engine(config)
        except BaseException:
            input_processor.close()
            tracer.close()
            raise
        self._assemble(config, engine, input_processor, LoopThread("loop"), tracer)

    @classmethod
    def from_parts(
        cls,
        config: EngineConfig,
        engine: Engine,
        input_processor: InputProcessor,
        loop: LoopThread,
    ) -> LLM:
        """Make an LLM of parts built elsewhere, such as an engine with a runner of another kind.

        Args:
            config: The configuration that the parts were built with.
            engine: The engine, which only this LLM uses from now on.
            input_processor: What prepares prompts for it; closed with the LLM.
            loop: The event loop on which prompts are prepared; closed with the LLM.
        """
        llm = cls.__new__(cls)
        tracer = Tracer(config.observability.trace_dir)
        llm._assemble(config, engine, input_processor, loop, tracer)
        return llm

    def _assemble(
        self,
        config: EngineConfig,
        engine: Engine,
        input_processor: InputProcessor,
        loop: LoopThread,
        tracer: Tracer,
    ) -> None:
        self.config = config
        self._made_in = forks.generation()
        self._engine = engine
        self._input_processor = input_processor
        self._loop = loop
        self._tracer = tracer
        input_processor.set_facts(engine.facts)
        closers = (loop.close, input_processor.close, tracer.close)
        self._release = weakref.finalize(self, forks.release, self._made_in, *closers)
        self._in_use = threading.Lock()
        self._closed = False
        self._run: BatchRun | None = None
        self._request_numbers = itertools.count()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and end its threads and processes. Only ``close`` may be called after it."""
        if not self._closed:
            self._closed = True
            self._release()
            del self._engine

    @overload
    def generate(
        self,
        prompts: object,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] | None = None,
        stream: Literal[False] = False,
    ) -> list[RequestOutput]: ...

    @overload
    def generate(
        self,
        prompts: object,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] | None = None,
        stream: Literal[True],
    ) -> Generator[RequestOutput, None, None]: ...

    @takes_call_keywords
    def generate(
        self,
        prompts: object,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] | None = None,
        stream: bool = False,
    ) -> list[RequestOutput] | Generator[RequestOutput, None, None]:
        """Complete one prompt, a list of prompts, or those of an iterator.

        Of an iterator (a generator, a data set, the lines of a file) only so many prompts are read
        ahead as keep the model busy: twice ``max_num_seqs`` are held at a time. It is read in the
        calling thread, between the model's steps.

        Args:
            prompts: A string, a dict with ``prompt`` or ``prompt_token_ids`` and optionally
                ``multi_modal_data``, ``multi_modal_uuids``, ``mm_processor_kwargs`` and
                ``cache_salt``; or a list or an iterator of these or of lists of token ids. A flat
                list of integers is one prompt.
            sampling_params: One for all, or one per prompt; the model's defaults when not given.
            use_tqdm: Show a progress bar.
            priority: One for all, or one per prompt. Lower ones run first, whatever the order of
                the prompts, and are the last to be preempted.
            stream: Yield each output when it is finished, whichever comes first; ``output.index``
                is the place of its prompt. Closing the generator ends the work.

        Returns:
            The outputs in the order of the prompts, or a generator of them with ``stream``.

        Raises:
            RequestError: A prompt cannot be served. Where that shows without loading media, nothing
                has run. Otherwise the prompts before it are finished, and the error has what is
                complete: ``error.outputs`` at their places, ``error.index`` the place of the
                prompt. What an iterator raises comes out as it is, when the prompts before are
                finished. The LLM can be used on.
        """
        values, several = apart(prompts)
        batch = self._text_batch(values, several, self._parse_prompt, sampling_params)
        return self._results(prioritized(batch, priority), use_tqdm, stream, unchanged)

    @overload
    def chat(
        self,
        messages: Iterable[Any],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        stream: Literal[False] = False,
        **options: Any,
    ) -> list[RequestOutput]: ...

    @overload
    def chat(
        self,
        messages: Iterable[Any],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        stream: Literal[True],
        **options: Any,
    ) -> Generator[RequestOutput, None, None]: ...

    @takes_call_keywords  # type: ignore[misc]  # the options are not written out three times
    def chat(
        self,
        messages: Iterable[Any],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        priority: int | Sequence[int] | None = None,
        stream: bool = False,
    ) -> list[RequestOutput] | Generator[RequestOutput, None, None]:
        """Answer one conversation, a list of conversations, or those of an iterator.

        Iterators, the outputs returned and errors are as for ``generate``.

        Args:
            messages: A conversation is a list of messages, dicts as in OpenAI's API. Parts of their
                content may be URLs, PIL images (``image_pil``) and, where enabled, embeddings.
            sampling_params: One for all, or one per conversation.
            use_tqdm: Show a progress bar.
            chat_template: A template in place of the model's.
            add_generation_prompt: Let the template open the answer.
            continue_final_message: Go on with the last message instead of answering it.
            tools: Tools as in OpenAI's API, for the template.
            chat_template_kwargs: Variables of the template.
            mm_processor_kwargs: Options of the model's processor.
            priority: As for ``generate``.
            stream: As for ``generate``.
        """

        def parse(conversation: Any) -> Prompt:
            return chat_prompt(
                conversation,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
                mm_processor_kwargs=mm_processor_kwargs,
            )

        values, several = conversations(messages)
        batch = self._text_batch(values, several, parse, sampling_params)
        return self._results(prioritized(batch, priority), use_tqdm, stream, unchanged)

    @overload
    def embed(
        self,
        prompts: object,
        *,
        pooling_params: Pooling = None,
        use_tqdm: bool = True,
        stream: Literal[False] = False,
    ) -> list[EmbeddingRequestOutput]: ...

    @overload
    def embed(
        self,
        prompts: object,
        *,
        pooling_params: Pooling = None,
        use_tqdm: bool = True,
        stream: Literal[True],
    ) -> Generator[EmbeddingRequestOutput, None, None]: ...

    @takes_call_keywords
    def embed(
        self,
        prompts: object,
        *,
        pooling_params: Pooling = None,
        use_tqdm: bool = True,
        stream: bool = False,
    ) -> list[EmbeddingRequestOutput] | Generator[EmbeddingRequestOutput, None, None]:
        """Make the embedding of each prompt, as a list of numbers in ``outputs.embedding``.

        Args:
            prompts: As for ``generate``; or dicts with ``messages``, which the chat template
                renders, and optionally ``add_generation_prompt``, ``continue_final_message``,
                ``chat_template``, ``chat_template_kwargs``, ``add_special_tokens``,
                ``mm_processor_kwargs`` and ``cache_salt``.
            pooling_params: One for all, or one per prompt.
            use_tqdm: Show a progress bar.
            stream: As for ``generate``, as are the outputs returned and errors.
        """
        batch = self._vector_batch(prompts, pooling_params)
        return self._results(batch, use_tqdm, stream, as_embedding)

    @takes_call_keywords
    def encode(
        self,
        prompts: object,
        pooling_params: Pooling = None,
        use_tqdm: bool = True,
        *,
        pooling_task: str = "embed",
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Make the embedding of each prompt, as a tensor (dimensions,) float32 in ``outputs.data``.

        Arguments and errors are those of ``embed``; ``pooling_task`` may only be "embed".
        """
        if pooling_task != "embed":
            raise InvalidRequestError(
                f"pooling_task must be 'embed', got {pooling_task!r}.", param="pooling_task"
            )
        return self._complete(self._vector_batch(prompts, pooling_params), use_tqdm, as_tensor)

    def chat_stream(
        self, messages: Sequence[Any], sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Answer one conversation, yielding the output (one object, updated in place) as it grows.

        Closing the generator ends the work.
        """
        batch = self._text_batch([messages], False, chat_prompt, sampling_params)
        with closing(self._outputs(batch)) as outputs:
            for _, output in outputs:
                if isinstance(output, RequestOutput):
                    yield output

    def get_tokenizer(self) -> Tokenizer:
        """Return the model's tokenizer."""
        return self._input_processor.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the sampling parameters of the model's generation_config.json."""
        return SamplingParams(**self._input_processor.default_params)

    def stats(self) -> EngineStats:
        """Return counters of the engine and of the media pipeline since the start."""
        self._check_open()
        stats = self._engine.stats()
        stats.media = self._input_processor.media_stats()
        return stats

    def _check_open(self) -> None:
        forks.check_owner(self._made_in, "LLM")
        if self._closed:
            raise InvalidRequestError("This LLM has been closed; make a new one.")

    def _parse_prompt(self, value: object) -> Prompt:
        return parse_prompt(value, enable_mm_embeds=self.config.media.enable_mm_embeds)

    def _parse_input(self, value: object) -> Prompt:
        return parse_input(value, enable_mm_embeds=self.config.media.enable_mm_embeds)

    def _text_batch(
        self,
        values: Iterable[Any],
        several: bool,
        parse: Callable[[Any], Prompt],
        params: Params,
    ) -> Batch:
        """What is to be generated, checked as far as that goes without loading media."""
        self._check_open()
        given = self.get_default_sampling_params() if params is None else params
        if is_read_late(values):
            each = each_with(given, SamplingParams, "sampling_params", self._checked)
            return self._late_batch(values, parse, each)
        values = list(values)
        return self._batch(values, several, parse, self._sampling(given, len(values)))

    def _vector_batch(self, prompts: object, params: Pooling) -> Batch:
        """Of what vectors are to be made, checked as far as that goes without loading media."""
        self._check_open()
        given = PoolingParams() if params is None else params

        def checked(one: PoolingParams) -> PoolingParams:
            return resolved(self._input_processor.embedder, one)

        values, several = apart(prompts)
        if is_read_late(values):
            each = each_with(given, PoolingParams, "pooling_params", checked)
            return self._late_batch(values, self._parse_input, each)
        values = list(values)
        for_each = [checked(o) for o in listed(given, len(values), PoolingParams, "pooling_params")]
        return self._batch(values, several, self._parse_input, for_each)

    def _batch(
        self,
        values: Sequence[Any],
        several: bool,
        parse: Callable[[Any], Prompt],
        params: Sequence[SamplingParams] | Sequence[PoolingParams],
    ) -> Batch:
        prompts = [at_prompt(index, several, parse, value) for index, value in enumerate(values)]
        rendered = [
            at_prompt(index, several, self._input_processor.render, prompt)
            for index, prompt in enumerate(prompts)
        ]
        items = map(BatchPrompt, prompts, rendered, params)
        return Batch(items, several, len(prompts))

    def _late_batch(
        self,
        values: Iterable[Any],
        parse: Callable[[Any], Prompt],
        params: Iterator[SamplingParams | PoolingParams],
    ) -> Batch:
        def read(value: Any) -> BatchPrompt:
            prompt = parse(value)
            return BatchPrompt(prompt, self._input_processor.render(prompt), next(params))

        prompts = (at_prompt(index, True, read, value) for index, value in enumerate(values))
        return Batch(prompts, several=True, total=None)

    def _sampling(self, given: object, num_prompts: int) -> list[SamplingParams]:
        """Sampling values for each prompt of a list, checked."""
        for_each = listed(given, num_prompts, SamplingParams, "sampling_params")
        several = not isinstance(given, SamplingParams)
        different = distinct(for_each)
        for index, one in different:
            at_prompt(index, several, self._input_processor.check_params, one)
        constrained = [(index, one) for index, one in different if one.structured_outputs]
        for some in batched(constrained, COMPILED_AT_ONCE):
            compiled = [self._loop.submit(self._input_processor.grammar(one)) for _, one in some]
            concurrent.futures.wait(compiled)
            for (index, _), grammar in zip(some, compiled, strict=True):
                at_prompt(index, several, lambda done: done.result(), grammar)
        return for_each

    def _checked(self, params: SamplingParams) -> SamplingParams:
        return self._sampling(params, 1)[0]

    def _results(
        self, batch: Batch, use_tqdm: bool, stream: bool, form: Callable[[Any], Result]
    ) -> list[Result] | Generator[Result, None, None]:
        if stream:
            return self._streamed(batch, use_tqdm, form)
        return self._complete(batch, use_tqdm, form)

    def _streamed(
        self, batch: Batch, use_tqdm: bool, form: Callable[[Any], Result]
    ) -> Generator[Result, None, None]:
        with closing(self._finished(batch, use_tqdm)) as finished:
            for _, output in finished:
                yield form(output)

    def _complete(
        self, batch: Batch, use_tqdm: bool, form: Callable[[Any], Result]
    ) -> list[Result]:
        """The outputs of a batch when all are finished; an error carries those that are."""
        outputs: list[Result | None] = [None] * (batch.total or 0)
        try:
            for index, output in self._finished(batch, use_tqdm):
                outputs += [None] * (index + 1 - len(outputs))
                outputs[index] = form(output)
        except SensoriumError as error:
            error.outputs = outputs
            raise
        return cast("list[Result]", outputs)

    def _finished(self, batch: Batch, use_tqdm: bool) -> Generator[tuple[int, Output], None, None]:
        """Run a batch and yield (index, output) of each prompt when it is complete."""
        with (
            Progress(batch.total, shown=use_tqdm) as progress,
            closing(self._outputs(batch)) as outputs,
        ):
            for index, output in outputs:
                if output.finished:
                    progress.done(output)
                    yield index, output

    def _outputs(self, batch: Batch) -> Generator[tuple[int, Output], None, None]:
        """Run a batch and yield (index, output) whenever one moved; ends all work when left early."""
        if not self._in_use.acquire(blocking=False):
            raise InvalidRequestError(
                "This LLM is in the middle of another call: exhaust or close the stream that chat_stream or "
                "stream=True returned, or wait for the other thread."
            )
        try:
            self._check_open()
            if self._run is not None:  # another interrupt came while it cleaned up
                self._run.clean_up(whole=False)
            self._run = self._new_run(batch)
            with closing(self._run.outputs()) as outputs:
                for output in outputs:
                    yield output
                    self._check_open()  # much may have happened since
        finally:
            if self._run is not None and self._run.is_clean:
                self._run = None
            self._in_use.release()

    def _new_run(self, batch: Batch) -> BatchRun:
        return BatchRun(
            batch,
            self._engine,
            self._input_processor,
            self._loop,
            self._request_numbers,
            self._tracer,
            max_num_seqs=self.config.scheduler.max_num_seqs,
        )
