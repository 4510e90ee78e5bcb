"""The input processor: from prompts to engine requests.

It renders templates, tokenizes, loads media, expands placeholders, computes positions and checks
all limits, for ``LLM`` and the server alike.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from sensorium import tracing
from sensorium.config import EngineConfig
from sensorium.core.request import EngineRequest
from sensorium.engine.grammar.compiler import GrammarCompiler, grammar_server
from sensorium.engine.prompts.adapters import KnownAdapters, with_adapter
from sensorium.engine.prompts.defaults import generation_values, sampling_defaults
from sensorium.engine.prompts.deprecated import check_deprecated
from sensorium.engine.prompts.expansion import Traits, advised, expanded
from sensorium.engine.prompts.files import files_opened
from sensorium.engine.prompts.lengths import (
    is_long,
    kept_tokens,
    predicted_ids,
    refuse_endless,
    refuse_many,
    room,
    truncate_ids,
    truncate_text,
)
from sensorium.engine.prompts.media_workers import media_pipeline
from sensorium.engine.prompts.turns import KeptItems, without_first_turns
from sensorium.engine.prompts.types import (
    ChatPrompt,
    PreparedPrompt,
    Prompt,
    RawPrompt,
    RopeChoice,
)
from sensorium.engine.prompts.vocabulary import (
    Vocabulary,
    end_tokens,
    tokenizer_folder,
    transcription_prompt,
)
from sensorium.engine.stats import EngineFacts
from sensorium.errors import InvalidRequestError, located
from sensorium.models import loader
from sensorium.models.embedder import GENERATES, POOLS, embedder_of
from sensorium.models.interface import stop_token_ids, warn_of_defaults
from sensorium.models.loading.quantization import refuse_unsupported
from sensorium.models.registry import resolve
from sensorium.multimodal.cache.features import NamedFeatures
from sensorium.multimodal.items import MediaItem, Modality
from sensorium.multimodal.parse.limits import check_modality
from sensorium.multimodal.placeholders import (
    NumberedPlaceholder,
    PlaceholderIds,
    check_counts,
)
from sensorium.multimodal.processor import Processor
from sensorium.params import PoolingParams, SamplingParams
from sensorium.text.chat.apply import template_applier
from sensorium.text.chat.chat_template import ChatTemplate, RenderedPrompt
from sensorium.text.grammar.library import Grammar
from sensorium.text.tokenizer import Tokenizer


class InputProcessor:
    """Tokenizer, chat template, processor and media pipeline of a model: all but its weights.

    Used from one event loop. ``set_facts`` must be called with what the engine found out before
    requests are built. ``embedder`` says how the model makes vectors; None when it generates text.
    ``transcription``: as in ``Family``. ``shared``: the engine is another process, which must be
    able to open all features; the media workers are then started at once. ``package_files``: the
    program's own prompts, which may name its assets. ``elsewhere``: as in ``MediaPipeline``.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        trust_request_chat_template: bool = False,
        shared: bool = False,
        package_files: bool = False,
        elsewhere: NamedFeatures | None = None,
    ) -> None:
        self._config, model = config, config.model
        self._loaded = loader.read_config_of(model)
        self._generation = generation_values(self._loaded.generation, model)
        family = resolve(self._loaded.config)
        refuse_unsupported(self._loaded, native=family.quantizable, named=model.quantization)
        shape = family.shape(self._loaded)
        self._vocab_size = shape.vocab_size
        self.embedder = embedder_of(self._loaded, family, model.runner)
        self._processor = family.build_processor(self._loaded)
        warn_of_defaults(self._loaded, family)
        self._traits = Traits(self._processor, family.bidirectional, RopeChoice.of(shape))
        check_deprecated(config.deprecated, self._processor, config.media)
        self._placeholders = _placeholders(self._processor)
        self._folder = tokenizer_folder(model, self._loaded)
        self.tokenizer = Tokenizer.from_folder(
            self._folder, eos_token_ids=stop_token_ids(self._loaded)
        )
        self._vocabulary = Vocabulary(
            self.tokenizer, self._vocab_size, self._processor, self._placeholder_texts()
        )
        self._vocabulary.warn()
        self._eos_token_ids = end_tokens(self.tokenizer, family.stop_tokens)
        self.transcription = transcription_prompt(self.tokenizer, family)
        self._template = ChatTemplate.load(
            self._loaded.folder,
            self.tokenizer,
            chat_template=model.chat_template,
            fallback=family.chat_template(),
            content_format=model.chat_template_content_format,
            interleave_mm_strings=model.interleave_mm_strings,
            trust_request_chat_template=trust_request_chat_template,
            placeholder_texts=self._placeholder_texts(),
            placeholders=self._placeholders,
        )
        self.tokenizer.template = template_applier(self._template, self._placeholder_text)
        self._pipeline = media_pipeline(
            config, self._processor, shared=shared, package_files=package_files, elsewhere=elsewhere
        )
        seconds = config.scheduler.grammar_timeout
        self._grammars = GrammarCompiler(
            grammar_server(str(self._folder), self._vocab_size, seconds), seconds=seconds
        )
        self._random = random.Random(model.seed)
        self._facts: EngineFacts | None = None
        self.adapters = KnownAdapters()

    @property
    def runner(self) -> Literal["generate", "pooling"]:
        """Return what the model makes of prompts: text, or embeddings ("pooling")."""
        return "generate" if self.embedder is None else "pooling"

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Return the modalities that the model takes and the limits allow, besides text."""
        known = self._processor.modalities if self._processor is not None else ()
        return tuple(m for m in known if self._config.media.limit(m) != 0)

    @property
    def default_params(self) -> dict[str, Any]:
        """Return the default sampling parameters."""
        return sampling_defaults(self._generation)

    @property
    def chat_template_available(self) -> bool:
        """Return True if the model has a chat template, or was given one."""
        return self._template.exists

    @property
    def template_text(self) -> str:
        """Return the text of the model's chat templates; empty without any."""
        return self._template.text

    def set_facts(self, facts: EngineFacts) -> None:
        """Set the limits that the engine found; required before requests are built."""
        self._facts = facts
        self.adapters.set(facts.adapters)

    def media_stats(self) -> dict[str, float]:
        """Return the counters of the media pipeline by name; empty for a text model."""
        return self._pipeline.stats().flat() if self._pipeline is not None else {}

    def close(self) -> None:
        """End the media workers and the helper that compiles grammars."""
        self._grammars.close()
        if self._pipeline is not None:
            self._pipeline.close()

    async def prepare(self, prompt: Prompt) -> PreparedPrompt:
        """Render or tokenize a prompt, load its media, expand its placeholders.

        Files are opened and media are loaded once, however many turns have to be left out. Raises
        RequestError.
        """
        async with files_opened(prompt, self._pipeline) as prompt:
            if isinstance(prompt, ChatPrompt) and prompt.drops_turns:
                kept = KeptItems(self._processor)
                complete = partial(self.complete, kept=kept)
                return await without_first_turns(prompt, self._rendered_aside, complete)
            return await self.complete(prompt, await self._rendered_aside(prompt))

    async def _rendered_aside(self, prompt: Prompt) -> RenderedPrompt:
        """Render or tokenize a prompt, a long one in a thread. Raises RequestError."""
        began = time.monotonic()
        if is_long(prompt):
            rendered = await asyncio.to_thread(self.render, prompt)
        else:
            rendered = self.render(prompt)
        num_items = len(rendered.refs)
        tracing.station("rendered", began, tokens=len(rendered.token_ids), items=num_items)
        return rendered

    def render(self, prompt: Prompt) -> RenderedPrompt:
        """Render or tokenize a prompt, and check all that needs no media.

        Raises RequestError.
        """
        rendered = (
            self._rendered(prompt) if isinstance(prompt, ChatPrompt) else self._tokenized(prompt)
        )
        ids, refs, param = rendered.token_ids, rendered.refs, prompt.param
        if not ids:
            raise InvalidRequestError("The prompt is empty.", param=param)
        self._vocabulary.check(ids, param)
        self._room(len(ids), param)
        if self._pipeline is not None:
            self._pipeline.check(refs)
        else:
            for ref in refs:
                check_modality(ref, (), self._config.media)
        if self._processor is not None:
            counts = Counter[Modality]()
            for ref in refs:
                counts[ref.modality] += len(ref.uuids) or 1
            unread = {ref.modality for ref in refs if ref.kind == "embeds"}
            with located(param), advised(prompt):
                check_counts(ids, counts, unread, rendered.numbered, self._processor)
        return rendered

    async def complete(
        self, prompt: Prompt, rendered: RenderedPrompt, kept: KeptItems | None = None
    ) -> PreparedPrompt:
        """Load the media of a rendered prompt and expand its placeholders.

        ``kept``: items of longer forms of the prompt, and those that are loaded here. Raises
        RequestError.
        """
        items = await self._items(prompt, rendered, kept)
        with located(prompt.param), advised(prompt):
            prepared = expanded(prompt, rendered, items, self._traits, self._room)
        prepared = with_adapter(prepared, self.adapters.find(prompt.media.adapter))
        self._vocabulary.check_expanded(prepared.token_ids, prepared.spans, prompt.param)
        tracing.station("prepared", tokens=len(prepared.token_ids), items=len(items))
        return prepared

    async def grammar(self, params: SamplingParams) -> Grammar | None:
        """Compile the constraint in ``params``; return None without one.

        Raises RequestError for a constraint that cannot be used, UnavailableError when the helper
        process fails.
        """
        if params.structured_outputs is None:
            return None
        return await self._grammars.compile(params.structured_outputs)

    async def predicted_ids(self, params: SamplingParams) -> tuple[int, ...]:
        """Return the tokens of the answer that is expected; none where no tokens are tried."""
        if not params.prediction or self._config.speculation.speculative is None:
            return ()
        encode = partial(self.tokenizer.encode, add_special_tokens=False)
        return await predicted_ids(params.prediction, self._context, self._vocab_size, encode)

    def requests(
        self,
        prepared: PreparedPrompt,
        params: SamplingParams,
        request_id: str,
        priority: int,
        arrival_time: float,
        grammar: Grammar | None = None,
        predicted_ids: tuple[int, ...] = (),
    ) -> list[EngineRequest]:
        """Return the engine's requests of a prompt, one per sample.

        They carry only the parameters that the engine needs: the output collector finds stop
        strings, a constraint is there as its ``grammar``, and an expected answer as
        ``predicted_ids``. Raises RequestError when the prompt does not fit.
        """
        if (grammar is None) != (params.structured_outputs is None):
            raise ValueError("a constraint and its grammar go together")
        self.check_params(params)
        refuse_many(
            params.n, len(prepared.token_ids), self._config.scheduler.max_sampled_prompt_tokens
        )
        if params.n * len(predicted_ids) > self._config.scheduler.max_sampled_prompt_tokens:
            predicted_ids = ()
        left = self._room(len(prepared.token_ids), prepared.param)
        max_tokens = left if params.max_tokens is None else min(params.max_tokens, left)
        bad_words = self.tokenizer.bad_words_token_ids(params.bad_words)
        seed = params.seed if params.seed is not None else self._random.getrandbits(63)
        slim = params.replace(n=1, stop=(), bad_words=(), structured_outputs=None, prediction=None)
        return [
            prepared.request(
                max_tokens,
                known_length=params.max_tokens is not None,
                request_id=request_id if params.n == 1 else f"{request_id}#{index}",
                # Samples of one request differ by their seed alone.
                params=slim.replace(seed=(seed + index) % (1 << 63)),
                eos_token_ids=self._eos_token_ids,
                bad_words_token_ids=bad_words,
                grammar=None if grammar is None else grammar.text,
                predicted_ids=predicted_ids,
                priority=priority,
                arrival_time=arrival_time,
            )
            for index in range(params.n)
        ]

    def check_params(self, params: SamplingParams) -> None:
        """Refuse token ids that the model lacks, and all parameters if it generates no text.

        Raises InvalidRequestError.
        """
        if self.embedder is not None:
            raise InvalidRequestError(POOLS)
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token_id in getattr(params, name) or ():
                if not 0 <= token_id < self._vocab_size:
                    place = f"{name}[{token_id}]" if name == "logit_bias" else name
                    raise InvalidRequestError(
                        f"{name} holds the token id {token_id}, which is outside the model's "
                        f"vocabulary of {self._vocab_size}.",
                        param=place,
                    )

    def resolve_pooling(self, params: PoolingParams) -> PoolingParams:
        """Return the parameters of an embedding with the model's defaults filled in.

        Raises InvalidRequestError when the model makes no such embeddings.
        """
        if self.embedder is None:
            raise InvalidRequestError(GENERATES)
        return self.embedder.resolve(params)

    def _rendered(self, prompt: ChatPrompt) -> RenderedPrompt:
        return self._template.render(
            prompt.conversation,
            placeholder_text=self._placeholder_text,
            add_generation_prompt=prompt.add_generation_prompt,
            continue_final_message=prompt.continue_final_message,
            tools=prompt.tools,
            chat_template=prompt.chat_template,
            chat_template_kwargs=prompt.chat_template_kwargs,
            default_kwargs=prompt.default_template_kwargs,
            # As in the reference: processors of multimodal models add a BOS that the template left
            # out, tokenizers of text models take the template's word.
            add_special_tokens=(None if self._processor is not None else False)
            if prompt.add_special_tokens is None
            else prompt.add_special_tokens,
            check_text=lambda text, count: self._refuse_endless(text, count, prompt.param),
        )

    def _tokenized(self, prompt: RawPrompt) -> RenderedPrompt:
        cut = prompt.truncation
        most = kept_tokens(cut, self._context) if cut is not None else 0
        if prompt.token_ids is not None:
            ids = prompt.token_ids
            if cut is not None:
                ids = truncate_ids(ids, most, left=cut.left)
            return RenderedPrompt(None, ids, prompt.refs)
        text, adds = prompt.text or "", prompt.add_special_tokens
        encode = partial(self.tokenizer.encode, add_special_tokens=False)
        if cut is not None:
            text = truncate_text(text, most, encode, left=cut.left)
        else:
            self._refuse_endless(text, lambda size: len(encode(text[:size])), prompt.param)
        with located(prompt.param):
            found, numbered = self._split(text, adds, prompt.param)
        ids = tuple(found)
        if cut is not None:
            prefix, suffix = self.tokenizer.prefix_ids, self.tokenizer.suffix_ids
            around = {"prefix": prefix, "suffix": suffix} if adds else {}
            ids = truncate_ids(ids, most, left=cut.left, **around)
        return RenderedPrompt(text, ids, prompt.refs, tuple(numbered))

    def _refuse_endless(self, text: str, count: Callable[[int], int], param: str) -> None:
        if self._facts is not None:
            refuse_endless(text, self._facts.max_model_len, count, param)

    def _split(
        self, text: str, add_special_tokens: bool, param: str
    ) -> tuple[list[int], list[NumberedPlaceholder]]:
        """Tokenize a raw prompt, and find its placeholders that are no single tokens."""
        if self._placeholders is None:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens), []
        # Each is a token at least, and costs a call of the tokenizer: more than fit are refused
        # before.
        most = None if self._facts is None else self._facts.max_model_len + 1
        pieces, found = self._placeholders.split(text, most)
        self._room(len(found), param)
        ids = self.tokenizer.encode(pieces[0], add_special_tokens=add_special_tokens)
        for placeholder, piece in zip(found, pieces[1:], strict=True):
            begun = self._placeholders.prefix_each and add_special_tokens
            ids += placeholder.ids
            ids += self.tokenizer.encode(piece, add_special_tokens=begun)
        return ids, found

    async def _items(
        self, prompt: Prompt, rendered: RenderedPrompt, kept: KeptItems | None
    ) -> list[MediaItem]:
        if not rendered.refs or self._pipeline is None:
            return []
        known = None if kept is None else kept.find(rendered.refs)
        if known is not None:
            return known
        media = prompt.media
        items = await self._pipeline.load(
            rendered.refs,
            mm_processor_kwargs=media.mm_processor_kwargs,
            media_io_kwargs=media.media_io_kwargs,
            cache_salt=media.cache_salt,
            tenant=media.tenant,
        )
        if kept is not None:
            kept.add(rendered.refs, items)
        return items

    def _room(self, num_tokens: int, param: str) -> int:
        """Return how many tokens can be generated after the prompt. Raises PromptTooLongError."""
        return room(num_tokens, self._context, param, generates=self.embedder is None)

    @property
    def _context(self) -> int:
        if self._facts is None:
            raise RuntimeError("set_facts was not called")
        return self._facts.max_model_len

    def _placeholder_text(self, modality: Modality, number: int) -> str:
        if self._processor is None or modality not in self._processor.modalities:
            return ""
        return self._processor.placeholder_text(modality, number)

    def _placeholder_texts(self) -> list[str]:
        known = self._processor.modalities if self._processor is not None else ()
        numbers = range(1, self._config.media.max_items_per_request + 1)
        texts = (self._placeholder_text(m, number) for m in known for number in numbers)
        return list(dict.fromkeys(texts))


def _placeholders(processor: Processor | None) -> PlaceholderIds | None:
    markup = processor.markup if processor is not None else None
    return None if processor is None or markup is None else PlaceholderIds(processor, markup)
