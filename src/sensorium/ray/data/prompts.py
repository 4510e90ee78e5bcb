"""Prompts of rows in both stages, as ``LLM`` takes them: texts, conversations, embeddings."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from typing import Any

from sensorium.config import EngineConfig
from sensorium.config.fields import suggestion
from sensorium.engine.prompts.types import Prompt, chat_prompt, parse_prompt
from sensorium.engine.serving.frontend import Frontend
from sensorium.errors import (
    EngineDeadError,
    InvalidRequestError,
    SensoriumError,
    UnavailableError,
)
from sensorium.outputs import RequestOutput
from sensorium.params import PoolingParams, SamplingParams
from sensorium.ray.data.fronts import (
    Prompts,
    engine_frontend,
    preparing_frontend,
    prompts_of_request,
)
from sensorium.server.batches.isolation import KILLER, Deaths, Gate, Patience

CHAT_OPTIONS = (
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tools",
    "chat_template_kwargs",
    "mm_processor_kwargs",
)
PROMPT_KEYS = (
    "prompt",
    "prompt_token_ids",
    "multi_modal_data",
    "multi_modal_uuids",
    "mm_processor_kwargs",
    "cache_salt",
)
PARAMS = ("sampling_params", "pooling_params")
READ = frozenset({"messages", *PROMPT_KEYS, *CHAT_OPTIONS, *PARAMS})
"""Columns that are read; all others are only passed on."""


class PromptStage:
    """Runs rows on a frontend. ``Stage`` of rows, see the two below."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._numbers = itertools.count()
        self._gate, self._patience = Gate(), Patience()

    async def start(self) -> None:
        """See ``Stage.start``."""
        self._frontend = await self._new_frontend()

    async def close(self) -> None:
        """See ``Stage.close``."""
        await self._frontend.shutdown()

    async def _new_frontend(self) -> Frontend:
        raise NotImplementedError

    def failed(self, work: Mapping[str, Any], code: str, message: str) -> dict[str, Any]:
        """See ``Stage.failed``."""
        return self._whole({"error": {"message": message, "code": code, "param": None}})

    async def _columns(self, work: Mapping[str, Any], prompts: Prompts) -> dict[str, Any] | None:
        """Return the columns of a row's result, or of its error.

        None when the engine was away for too long.
        """
        deaths = Deaths()
        with prompts_of_request(prompts):
            return await self._patience.repeat(lambda: self._attempt(work, deaths))

    async def _attempt(self, work: Mapping[str, Any], deaths: Deaths) -> dict[str, Any]:
        """Return what one attempt gives, in its turn. Raises UnavailableError."""
        try:
            async with self._gate.turn(deaths):
                return self._whole(await self._result(work))
        except UnavailableError as error:
            deaths.note(error.message)
            if deaths.verdict is None:
                raise
            return self.failed(work, KILLER, deaths.verdict)
        except SensoriumError as error:
            return self._failed(error)

    def _whole(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Return columns with those that are missing as None."""
        pools = self._frontend.input_processor.runner == "pooling"
        names = EMBEDDING_COLUMNS if pools else TEXT_COLUMNS
        return dict.fromkeys((*names, "error")) | columns

    def _failed(self, error: SensoriumError) -> dict[str, Any]:
        found = {"message": error.message, "code": error.code, "param": error.param}
        return self._whole({"error": found})

    async def _result(self, work: Mapping[str, Any]) -> dict[str, Any]:
        processor = self._frontend.input_processor
        prompt = prompt_of(work, enable_mm_embeds=self._config.media.enable_mm_embeds)
        request_id = f"row-{next(self._numbers)}"
        if processor.runner == "pooling":
            pooling = _params(work, "pooling_params", PoolingParams, {})
            pooled = await self._frontend.embed(prompt, pooling, request_id=request_id)
            return {
                "embedding": pooled.outputs.tolist(),
                "num_input_tokens": len(pooled.prompt_token_ids),
            }
        params = _params(work, "sampling_params", SamplingParams, processor.default_params)
        output: RequestOutput | None = None
        updates = self._frontend.generate(prompt, params, request_id=request_id)
        async for update in updates:
            output = update
        assert output is not None
        return _text_columns(output)


class PromptPreparation(PromptStage):
    """First stage: prepares a row's prompt, and gives a row that cannot be served its error."""

    async def run(self, work: Mapping[str, Any], prompts: Prompts) -> dict[str, Any] | None:
        """Return the columns of an error; None for a prompt that is ready."""
        columns = await self._columns(work, prompts)
        return columns if columns is not None and columns.get("error") else None

    async def _new_frontend(self) -> Frontend:
        return await asyncio.to_thread(preparing_frontend, self._config)


class PromptAnswer(PromptStage):
    """Second stage: runs a row whose prompt is ready."""

    async def run(self, work: Mapping[str, Any], prompts: Prompts) -> dict[str, Any]:
        """Return the columns of a row's output, or of its error."""
        columns = await self._columns(work, prompts)
        return columns or self._failed(EngineDeadError("The engine was away for too long."))

    async def _new_frontend(self) -> Frontend:
        return await engine_frontend(self._config)


TEXT_COLUMNS = (
    "generated_text",
    "generated_tokens",
    "finish_reason",
    "num_input_tokens",
    "num_generated_tokens",
)
EMBEDDING_COLUMNS = ("embedding", "num_input_tokens")


def prompt_of(work: Mapping[str, Any], *, enable_mm_embeds: bool) -> Prompt:
    """Return the prompt of a row. Raises RequestError."""
    given = {name: work[name] for name in READ if work.get(name) is not None}
    if "messages" in given:
        if "prompt" in given or "prompt_token_ids" in given:
            raise InvalidRequestError("A row has either messages or a prompt.", param="messages")
        options = {name: given[name] for name in CHAT_OPTIONS if name in given}
        return chat_prompt(given["messages"], **options)
    if "prompt" not in given and "prompt_token_ids" not in given:
        near = next(filter(None, (suggestion(str(name), list(READ)) for name in work)), "")
        raise InvalidRequestError(
            f"A row needs messages, prompt or prompt_token_ids; it has: {', '.join(work)}.{near}",
            param="prompt",
        )
    named = {name: given[name] for name in PROMPT_KEYS if name in given}
    return parse_prompt(named, enable_mm_embeds=enable_mm_embeds)


def _params(work: Mapping[str, Any], name: str, kind: Any, defaults: Mapping[str, Any]) -> Any:
    given = work.get(name)
    if isinstance(given, kind):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise InvalidRequestError(f"{name} must be a mapping, got {given!r:.80}.", param=name)
    values = {key: value for key, value in (given or {}).items() if value is not None}
    try:
        return kind(**{**defaults, **values})
    except TypeError as error:
        raise InvalidRequestError(f"{name}: {error}", param=name) from error


def _text_columns(output: RequestOutput) -> dict[str, Any]:
    """Return text and tokens: of several samples lists, as ``n`` in the parameters says."""
    samples = output.outputs
    one = len(samples) == 1
    first = samples[0]
    return {
        "generated_text": first.text if one else [sample.text for sample in samples],
        "generated_tokens": first.token_ids if one else [sample.token_ids for sample in samples],
        "finish_reason": first.finish_reason if one else [s.finish_reason for s in samples],
        "num_input_tokens": len(output.prompt_token_ids),
        "num_generated_tokens": sum(len(sample.token_ids) for sample in samples),
    }
