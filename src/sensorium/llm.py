"""The offline ``LLM``: the engine runs in the caller's thread, media load elsewhere."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Literal, overload

from sensorium.compat.calls import takes_call_keywords
from sensorium.config import EngineConfig, engine_config
from sensorium.engine.engine import Engine
from sensorium.engine.offline.adapters import Parse, adapting, using_adapters
from sensorium.engine.offline.batch import (
    BatchBuilder,
    BatchInput,
    Prompts,
    as_array,
    as_embedding,
    as_list,
    as_scores,
    as_tensor,
    conversations,
    unchanged,
)
from sensorium.engine.offline.engine import OfflineEngine
from sensorium.engine.prompts.input_processor import InputProcessor
from sensorium.engine.prompts.types import chat_prompt, parse_input, parse_prompt
from sensorium.engine.stats import EngineStats
from sensorium.errors import InvalidRequestError
from sensorium.multimodal.workers.event_loop import LoopThread
from sensorium.outputs import (
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringRequestOutput,
)
from sensorium.params import LoRARequest, PoolingParams, SamplingParams
from sensorium.text.tokenizer import Tokenizer
from sensorium.tracing import Tracer

Params = SamplingParams | Iterable[SamplingParams] | None
Pooling = PoolingParams | Iterable[PoolingParams] | None
Adapters = LoRARequest | Sequence[LoRARequest | None] | None


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
        self._use(OfflineEngine.build(engine_config(model=model, **keywords)))

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
        options = config.observability
        tracer = Tracer(options.trace_dir, options.otlp_traces_endpoint, config.model.model)
        llm._use(OfflineEngine(config, engine, input_processor, loop, tracer))
        return llm

    def _use(self, engine: OfflineEngine) -> None:
        self.config = engine.config
        self._engine = engine
        self._batches = BatchBuilder(engine.input_processor, engine.loop)
        embeds = engine.config.media.enable_mm_embeds
        self._parse_prompt = partial(parse_prompt, enable_mm_embeds=embeds)
        self._parse_input = partial(parse_input, enable_mm_embeds=embeds)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and end its threads and processes; nothing else may follow."""
        self._engine.close()

    @overload
    def generate(
        self,
        prompts: object,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] | None = None,
        lora_request: Adapters = None,
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
        lora_request: Adapters = None,
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
        lora_request: Adapters = None,
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
            lora_request: The LoRA adapter of all prompts, or of each; None for the model itself.
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
        self._engine.check_open()
        given = as_list(prompts)
        parse = self._adapting(self._parse_prompt, given, lora_request)
        batch = self._batches.text(given, parse, sampling_params, priority)
        batch = using_adapters(batch, lora_request)
        return self._engine.results(batch, use_tqdm, stream, unchanged)

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
        lora_request: Adapters = None,
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
            lora_request: As for ``generate``.
            stream: As for ``generate``.
        """
        self._engine.check_open()
        parse: Parse = partial(
            chat_prompt,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            mm_processor_kwargs=mm_processor_kwargs,
        )
        given = conversations(messages)
        parse = self._adapting(parse, given, lora_request)
        batch = self._batches.text(given, parse, sampling_params, priority)
        batch = using_adapters(batch, lora_request)
        return self._engine.results(batch, use_tqdm, stream, unchanged)

    @overload
    def embed(
        self,
        prompts: object,
        *,
        pooling_params: Pooling = None,
        use_tqdm: bool = True,
        lora_request: Adapters = None,
        stream: Literal[False] = False,
    ) -> list[EmbeddingRequestOutput]: ...

    @overload
    def embed(
        self,
        prompts: object,
        *,
        pooling_params: Pooling = None,
        use_tqdm: bool = True,
        lora_request: Adapters = None,
        stream: Literal[True],
    ) -> Generator[EmbeddingRequestOutput, None, None]: ...

    @takes_call_keywords
    def embed(
        self,
        prompts: object,
        *,
        pooling_params: Pooling = None,
        use_tqdm: bool = True,
        lora_request: Adapters = None,
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
            lora_request: As for ``generate``.
            stream: As for ``generate``, as are the outputs returned and errors.
        """
        batch = self._embedding_batch(prompts, pooling_params, lora_request)
        return self._engine.results(batch, use_tqdm, stream, as_embedding)

    @takes_call_keywords
    def encode(
        self,
        prompts: object,
        pooling_params: Pooling = None,
        use_tqdm: bool = True,
        *,
        pooling_task: str = "embed",
        lora_request: Adapters = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Make the embedding of each prompt, as a tensor (dimensions,) float32 in ``outputs.data``.

        Arguments and errors are those of ``embed``; ``pooling_task`` may only be "embed".
        """
        if pooling_task != "embed":
            raise InvalidRequestError(
                f"pooling_task must be 'embed', got {pooling_task!r}.", param="pooling_task"
            )
        batch = self._embedding_batch(prompts, pooling_params, lora_request)
        return self._engine.complete(batch, use_tqdm, as_tensor)

    @takes_call_keywords
    def score(
        self,
        data_1: object,
        data_2: object,
        /,
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> list[ScoringRequestOutput]:
        """Compare prompts by their embeddings: the cosine is in ``outputs.score``.

        Args:
            data_1: One prompt, or as many as in ``data_2``; of the kinds that ``embed`` takes.
            data_2: A prompt, or a list of prompts.
            pooling_params: ``dimensions`` of the embeddings that are compared.
            use_tqdm: Show a progress bar.
            lora_request: The LoRA adapter of all prompts.

        Raises:
            InvalidRequestError: The numbers of prompts do not fit, or as for ``embed``.
        """
        left, right = (list(as_list(data).values) for data in (data_1, data_2))
        if not right or len(left) not in (1, len(right)):
            raise InvalidRequestError(
                f"There are {len(left)} and {len(right)} prompts to compare; give one and any "
                "number, or as many of both.",
                param="data_1",
            )
        params = (pooling_params or PoolingParams()).replace(normalize=True)
        batch = self._embedding_batch([*left, *right], params, lora_request)
        outputs = self._engine.complete(batch, use_tqdm, as_array)
        return as_scores(outputs[: len(left)], outputs[len(left) :])

    def chat_stream(
        self, messages: Sequence[Any], sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Answer one conversation, yielding the output (one object, updated in place) as it grows.

        Closing the generator ends the work.
        """
        self._engine.check_open()
        batch = self._batches.text(Prompts([messages], False), chat_prompt, sampling_params)
        with closing(self._engine.updates(batch)) as outputs:
            for _, output in outputs:
                if isinstance(output, RequestOutput):
                    yield output

    def get_tokenizer(self) -> Tokenizer:
        """Return the model's tokenizer."""
        return self._engine.input_processor.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the sampling parameters of the model's generation_config.json."""
        return SamplingParams(**self._engine.input_processor.default_params)

    def stats(self) -> EngineStats:
        """Return counters of the engine and of the media pipeline since the start."""
        return self._engine.stats()

    def _embedding_batch(
        self, prompts: object, params: Pooling, lora_request: Adapters
    ) -> BatchInput:
        self._engine.check_open()
        given = as_list(prompts)
        parse = self._adapting(self._parse_input, given, lora_request)
        return using_adapters(self._batches.embeddings(given, parse, params), lora_request)

    def _adapting(self, parse: Parse, prompts: Prompts, lora_request: Adapters) -> Parse:
        """Return ``parse`` that also gives each prompt its adapter."""
        values = prompts.values
        num_prompts = len(values) if isinstance(values, list | tuple) else None
        return adapting(parse, lora_request, num_prompts)
