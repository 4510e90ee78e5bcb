"""``AsyncLLM``: the engine for programs with an event loop of their own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from sensorium import forks
from sensorium.config import EngineConfig, engine_config
from sensorium.engine.offline.adapters import requests_of, with_adapter
from sensorium.engine.offline.batch import as_embedding, as_tensor
from sensorium.engine.offline.request import AsyncRequest
from sensorium.engine.offline.run import PooledOutput
from sensorium.engine.prompts.types import Prompt, chat_prompt, parse_input, parse_prompt
from sensorium.engine.serving.frontend import Frontend
from sensorium.engine.serving.own_loop import LoopFrontend
from sensorium.engine.stats import EngineStats
from sensorium.errors import InvalidRequestError, UnavailableError
from sensorium.outputs import (
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
)
from sensorium.params import LoRARequest, PoolingParams, SamplingParams
from sensorium.text.tokenizer import Tokenizer

T = TypeVar("T")


class AsyncLLM:
    """A model that runs in a process of its own, for programs with an event loop.

    The model begins to load when the object is made; the first call waits for it, as does
    ``start``. Requests run at the same time, as many as ``max_num_seqs``, and others wait. Prompts
    are prepared in a thread, media in processes, so that no event loop of the caller waits for
    work. It may be used from several threads and event loops at once.

    Use it as an asynchronous context manager, or call ``close()``; one that nobody holds any more
    frees everything by itself. An engine that dies is restarted; what ran in it raises
    ``EngineDeadError``. A forked process cannot use one of its parent (``ForkedProcessError``).

    Args:
        model: Hugging Face id, local folder, "demo" or "demo-audio".
        **keywords: Engine options, as the page "Configuration" lists them.

    Raises:
        ConfigError: An option is wrong or unknown.
    """

    def __init__(self, model: str, **keywords: Any) -> None:
        self.config: EngineConfig = engine_config(model=model, **keywords)
        self.config.parallel.check_one_replica()
        self._made_in = forks.generation()
        self._engine = LoopFrontend(self.config)
        self._release = weakref.finalize(self, forks.release, self._made_in, self._engine.close)
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._open: dict[str, Callable[[], object]] = {}
        """Callbacks that abort each request that has not ended, on the engine's loop."""

    async def __aenter__(self) -> AsyncLLM:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self.close)

    async def start(self) -> None:
        """Wait until the model is loaded.

        Raises:
            ConfigError: The model cannot be loaded.
        """
        await self._started()

    def close(self) -> None:
        """End the engine's process and all workers; running requests raise an error."""
        self._release()

    def shutdown(self) -> None:
        """Do the same as ``close``, under vLLM's name."""
        self.close()

    def generate(
        self,
        prompt: object,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        lora_request: LoRARequest | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete one prompt, yielding an output whenever there is more of it.

        Leaving the loop (``break``, an error, a task that is cancelled) ends the work at whatever
        stage it is.

        Args:
            prompt: One prompt, as ``LLM.generate`` takes it.
            sampling_params: The model's defaults when not given. Its ``output_kind`` says what each
                output holds: the whole text so far ("cumulative", the default), what is new
                ("delta"; of several samples those that moved), or the finished answer alone
                ("final_only").
            request_id: Names the request for ``abort``; made up when not given.
            priority: Lower ones run first.
            lora_request: The LoRA adapter that it runs with; loaded at its first use.

        Yields:
            Outputs, the last of which is ``finished``. A slow reader gets several steps in one.

        Raises:
            RequestError: The prompt cannot be served, or the id is in use.
            EngineDeadError: The engine died.
            OverloadedError: More is being downloaded for all requests than
                ``max_media_bytes_in_flight``: start fewer at a time.
        """

        def parse() -> Prompt:
            return parse_prompt(prompt, enable_mm_embeds=self.config.media.enable_mm_embeds)

        return self._outputs(parse, sampling_params, request_id, priority, lora_request)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        lora_request: LoRARequest | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer one conversation, yielding outputs as ``generate`` does.

        Args:
            messages: The conversation, as for ``LLM.chat``, with the same options.
            sampling_params: The model's defaults when not given.
            request_id: Names the request for ``abort``; made up when not given.
            priority: Lower ones run first.
            lora_request: The LoRA adapter that it runs with; loaded at its first use.
            chat_template: A template in place of the model's.
            add_generation_prompt: Let the template open the answer.
            continue_final_message: Go on with the last message instead of answering it.
            tools: Tools as in OpenAI's API, for the template.
            chat_template_kwargs: Variables of the template.
            mm_processor_kwargs: Options of the model's processor.

        Raises:
            RequestError: The conversation cannot be served, as for ``generate``.
        """

        def parse() -> Prompt:
            return chat_prompt(
                messages,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
                mm_processor_kwargs=mm_processor_kwargs,
            )

        return self._outputs(parse, sampling_params, request_id, priority, lora_request)

    async def embed(
        self,
        prompt: object,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        lora_request: LoRARequest | None = None,
    ) -> EmbeddingRequestOutput:
        """Make the embedding of one prompt, as a list of numbers in ``outputs.embedding``.

        Cancelling ends the work.

        Args:
            prompt: One prompt, as ``LLM.embed`` takes it.
            pooling_params: What is done with the embedding.
            request_id: Names the request for ``abort``; made up when not given.
            priority: Lower ones run first.
            lora_request: The LoRA adapter that it runs with; loaded at its first use.

        Raises:
            RequestError: The prompt cannot be served, or the request was aborted; other errors are
                those of ``generate``.
        """
        given = (prompt, pooling_params, request_id, priority, lora_request)
        return as_embedding(await self._pooled(*given))

    async def encode(
        self,
        prompt: object,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        lora_request: LoRARequest | None = None,
    ) -> AsyncGenerator[PoolingRequestOutput[PoolingOutput], None]:
        """Make the embedding of one prompt, as a tensor.

        Yields:
            One output; ``outputs.data`` is a tensor (dimensions,) float32.
        """
        given = (prompt, pooling_params, request_id, priority, lora_request)
        yield as_tensor(await self._pooled(*given))

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests.

        The next output of each is its last one, with ``finish_reason`` "abort" for samples that
        were not complete.

        Args:
            request_id: An id, or several. Ids that are not in use are ignored.
        """
        await self._started()
        ids = [request_id] if isinstance(request_id, str) else list(request_id)

        async def end() -> None:
            for one in ids:
                abort = self._open.get(one)
                if abort is not None:
                    abort()

        await self._on_loop(end())

    async def add_lora(self, lora_request: LoRARequest) -> None:
        """Load a LoRA adapter before a request names it.

        Raises:
            ConfigError: It cannot be used, or there are ``max_loras`` already.
        """
        frontend = await self._started()
        name, path = lora_request.lora_name, lora_request.lora_path
        await self._on_loop(frontend.provide_adapter(name, path))

    async def remove_lora(self, lora_name: str) -> None:
        """Forget a LoRA adapter when the requests that use it have ended.

        Raises:
            ModelNotFoundError: There is none of this name.
        """
        frontend = await self._started()
        await self._on_loop(frontend.unload_adapter(lora_name))

    def request_ids(self) -> frozenset[str]:
        """Return the ids of the requests that have not ended, those that wait among them."""
        with self._lock:
            return frozenset(self._open)

    async def get_tokenizer(self) -> Tokenizer:
        """Return the model's tokenizer."""
        return (await self._started()).input_processor.tokenizer

    async def get_default_sampling_params(self) -> SamplingParams:
        """Return the sampling parameters of the model's generation_config.json."""
        return SamplingParams(**(await self._started()).input_processor.default_params)

    async def stats(self) -> EngineStats:
        """Return counters of the engine and of the media pipeline."""
        frontend = await self._started()
        return await self._on_loop(frontend.stats())

    async def check_health(self) -> None:
        """Check that the engine runs.

        Raises:
            EngineDeadError: The engine is being restarted.
        """
        frontend = await self._started()

        async def check() -> None:
            frontend.check_alive()

        await self._on_loop(check())

    @property
    def _is_closed(self) -> bool:
        """Return whether it was closed, or freed because Python ends."""
        return not self._release.alive

    async def _started(self) -> Frontend:
        forks.check_owner(self._made_in, "AsyncLLM")
        if self._is_closed:
            raise _closed()
        started = self._engine.started
        if started.done():
            return started.result()
        # Who gives up waiting does not end the start.
        return await self._waited(asyncio.shield(asyncio.wrap_future(started)))

    async def _outputs(
        self,
        parse: Callable[[], Prompt],
        params: SamplingParams | None,
        request_id: str | None,
        priority: int,
        lora_request: LoRARequest | None,
    ) -> AsyncGenerator[RequestOutput, None]:
        frontend = await self._started()
        prompt = await self._adapted(frontend, parse(), lora_request)
        params = await self.get_default_sampling_params() if params is None else params
        if not isinstance(params, SamplingParams):
            raise _not_params(params, SamplingParams, "sampling_params")
        number = self._new_number()
        updates = frontend.generate(prompt, params, request_id=number, priority=priority)
        name = self._name(request_id, number)
        request = AsyncRequest(name, updates, params)
        self._enter(name, request.abort)
        try:
            while (output := await self._on_loop(request.next())) is not None:
                yield output
        finally:
            self._open.pop(name, None)
            with contextlib.suppress(RuntimeError):  # closed, and the request with it
                self._engine.submit(request.close())

    async def _pooled(
        self,
        prompt: object,
        params: PoolingParams | None,
        request_id: str | None,
        priority: int,
        lora_request: LoRARequest | None,
    ) -> PooledOutput:
        frontend = await self._started()
        parsed = parse_input(prompt, enable_mm_embeds=self.config.media.enable_mm_embeds)
        parsed = await self._adapted(frontend, parsed, lora_request)
        params = PoolingParams() if params is None else params
        if not isinstance(params, PoolingParams):
            raise _not_params(params, PoolingParams, "pooling_params")
        number = self._new_number()
        name = self._name(request_id, number)
        aborted = asyncio.Event()
        self._enter(name, aborted.set)
        try:
            work = frontend.embed(parsed, params, request_id=number, priority=priority)
            output = await self._on_loop(_unless(aborted, work, name))
        finally:
            self._open.pop(name, None)
        output.request_id = name
        return output

    async def _adapted(
        self, frontend: Frontend, prompt: Prompt, lora_request: LoRARequest | None
    ) -> Prompt:
        """Return a prompt that runs with an adapter, which is loaded now if it is new."""
        [request] = requests_of(lora_request)
        if request is None:
            return prompt
        if request.lora_path:
            name, path = request.lora_name, request.lora_path
            await self._on_loop(frontend.provide_adapter(name, path))
        return with_adapter(prompt, request)

    def _new_number(self) -> str:
        """Return an id for the engine; callers' ids may be anything, and samples derive theirs."""
        return f"request-{next(self._numbers)}"

    def _name(self, given: str | None, number: str) -> str:
        if given is None:
            return number
        if not isinstance(given, str) or not given:
            raise InvalidRequestError(
                f"request_id must be a non-empty string, got {given!r:.80}.", param="request_id"
            )
        return given

    def _enter(self, request_id: str, abort: Callable[[], object]) -> None:
        with self._lock:
            if request_id in self._open:
                raise InvalidRequestError(
                    f"Request id {request_id!r:.80} is in use; take another one, or none.",
                    param="request_id",
                )
            self._open[request_id] = abort

    async def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``, done on the engine's loop; cancelling cancels it."""
        try:
            future = self._engine.submit(work)
        except RuntimeError:
            raise _closed() from None
        return await self._waited(asyncio.wrap_future(future))

    async def _waited(self, future: asyncio.Future[T]) -> T:
        try:
            return await future
        except UnavailableError:  # which speaks of a server
            if self._is_closed:
                raise _closed() from None
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._is_closed and (task is None or not task.cancelling()):
                raise _closed() from None
            raise


async def _unless(aborted: asyncio.Event, work: Coroutine[Any, Any, T], name: str) -> T:
    """The result of ``work``, ended when ``aborted`` is set. Raises InvalidRequestError then."""
    doing, waiting = asyncio.ensure_future(work), asyncio.ensure_future(aborted.wait())
    try:
        await asyncio.wait({doing, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise InvalidRequestError(f"Request {name!r:.80} was aborted.")
    finally:
        doing.cancel()
        waiting.cancel()


def _closed() -> InvalidRequestError:
    return InvalidRequestError("This AsyncLLM has been closed; make a new one.")


def _not_params(params: object, kind: type, name: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{name} must be a {kind.__name__}, got {type(params).__name__}.", param=name
    )
