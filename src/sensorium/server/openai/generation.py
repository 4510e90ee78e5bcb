"""Running the prompts of one request on the engine, and the numbers that answers report of them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sensorium.errors import UnavailableError, located
from sensorium.outputs import PoolingRequestOutput, RequestOutput
from sensorium.params import SamplingParams
from sensorium.server.admission import Place
from sensorium.server.context import ModelContext
from sensorium.server.openai.places import Rename, unchanged

if TYPE_CHECKING:
    from sensorium.engine.prompts.types import Prompt

IndexedOutput = tuple[int, RequestOutput]
"""Index of a prompt in its request, and its output so far."""

_OPTIONS = frozenset(
    f"structured_outputs.{name}" for name in ("whitespace", "whitespace_pattern", "unsupported")
)
"""Fields that keep their names, whichever field the constraint comes from."""
_IN_CALLS = re.compile(r"\.(?:items\.anyOf|tags)\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class ServingRequest:
    """The prompts of one HTTP request, with the sampling parameters that they share.

    ``constraint_param``: the field of the body that a constraint on the answer came from.
    ``tool_indices``: places in the body of the tools that the constraint is made of.
    ``client_names``: our fields by the names that the client used for them.
    ``warnings``: warnings of the engine so far; they go into the headers of the answer.
    ``rename``: maps places in a chat to those in the body, where that is of another form.
    """

    prompts: Sequence[Prompt]
    params: SamplingParams
    request_id: str
    priority: int = 0
    constraint_param: str = "structured_outputs"
    tool_indices: Sequence[int] = ()
    client_names: Mapping[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    rename: Rename = unchanged

    def headers(self) -> dict[str, str]:
        """Return the headers of the answer that carry warnings."""
        return {"X-Sensorium-Warning": "; ".join(self.warnings)} if self.warnings else {}

    def client_place(self, place: str) -> str:
        """Return the place in the body that a place in the prompt or the parameters came from."""
        return self.rename(self._place(place))

    def _place(self, place: str) -> str:
        """Return the place in a chat that a place in a constraint came from; others stay."""
        if not place.startswith("structured_outputs"):
            return place
        if self.constraint_param == "structured_outputs" or place in _OPTIONS:
            return self.client_names.get(place, place)
        call = _IN_CALLS.search(place)
        if self.constraint_param == "tools" and call is not None:
            number = int(call[1])
            known = number < len(self.tool_indices)
            index = self.tool_indices[number] if known else number
            return f"tools[{index}].function.parameters"
        return self.constraint_param


async def run_request(
    context: ModelContext, request: ServingRequest
) -> AsyncGenerator[IndexedOutput, None]:
    """Yield the index of a prompt and its output so far, at each update of the engine.

    The first error of any prompt ends all of them, and so does closing the generator. Raises
    OverloadedError at once when there is no room.
    """
    entering = context.admission.enter(len(request.prompts), num_samples=request.params.n)
    with entering as places, located(rename=request.client_place):
        if len(request.prompts) == 1:
            async with aclosing(_outputs(context, request, 0, places[0])) as outputs:
                async for output in outputs:
                    yield 0, output
        else:
            async with aclosing(_merged(context, request, places)) as merged:
                async for indexed in merged:
                    yield indexed


async def finished_outputs(context: ModelContext, request: ServingRequest) -> list[RequestOutput]:
    """Return the complete outputs of all prompts, in order."""
    async with aclosing(run_request(context, request)) as updates:
        done = {index: output async for index, output in updates}
    return [done[index] for index in range(len(request.prompts))]


async def _outputs(
    context: ModelContext, request: ServingRequest, index: int, place: Place
) -> AsyncGenerator[RequestOutput, None]:
    """Yield the outputs of one prompt. Its samples leave the queue with their first tokens."""
    stream = context.frontend.generate(
        request.prompts[index],
        request.params,
        request_id=context.engine_id(request.request_id),
        priority=request.priority,
    )
    async with aclosing(stream) as outputs:
        async for output in outputs:
            if place.num_held:
                place.keep(sum(not (s.token_ids or s.finished) for s in output.outputs))
            if any(sample.finish_reason == "error" for sample in output.outputs):
                raise UnavailableError("The engine could not finish this request; try again.")
            if output.warnings and not request.warnings:
                for warning in output.warnings:
                    param, colon, text = warning.partition(":")
                    request.warnings.append(f"{request.client_place(param)}{colon}{text}")
            yield output


async def _merged(
    context: ModelContext, request: ServingRequest, places: Sequence[Place]
) -> AsyncGenerator[IndexedOutput, None]:
    """Yield the outputs of several prompts as they come."""
    queue: asyncio.Queue[IndexedOutput | Exception | None] = asyncio.Queue(2 * len(places))

    async def follow(index: int) -> None:
        try:
            async with aclosing(_outputs(context, request, index, places[index])) as outputs:
                async for output in outputs:
                    await queue.put((index, output))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(follow(index)) for index in range(len(places))]
    try:
        num_open = len(tasks)
        while num_open:
            update = await queue.get()
            if update is None:
                num_open -= 1
            elif isinstance(update, Exception):
                raise update
            else:
                yield update
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def num_values(outputs: Iterable[RequestOutput]) -> int:
    """Estimate the JSON values of an answer with ``outputs``: its choices and log probabilities."""
    return sum(
        sum(1 + sum(map(len, sample.logprobs or ())) for sample in output.outputs)
        + sum(len(entry) for entry in output.prompt_logprobs or () if entry is not None)
        for output in outputs
    )


def usage(
    outputs: Iterable[RequestOutput],
    modalities: Iterable[str],
    *,
    num_hidden: int = 0,
    reasoning: Callable[[RequestOutput], int] | None = None,
    prediction: bool = False,
) -> dict[str, Any]:
    """Return the ``usage`` member of an answer with generated text.

    ``num_hidden``: generated tokens of each sample that the answer does not show. ``reasoning``
    counts the tokens of an output that are reasoning; None where there can be none. ``prediction``:
    the request has an expected answer, of which it is counted what was tried.
    """
    outputs = list(outputs)
    num_generated = sum(
        max(0, len(sample.token_ids) - num_hidden)
        for output in outputs
        for sample in output.outputs
    )
    found = usage_of_prompts(outputs, modalities, num_generated)
    details = {} if reasoning is None else {"reasoning_tokens": sum(map(reasoning, outputs))}
    if prediction:
        samples = [sample for output in outputs for sample in output.outputs]
        for name in ("accepted_prediction_tokens", "rejected_prediction_tokens"):
            details[name] = sum(getattr(sample, name) for sample in samples)
    if details:
        found["completion_tokens_details"] = details
    return found


def usage_of_prompts(
    outputs: Sequence[RequestOutput | PoolingRequestOutput[Any]],
    modalities: Iterable[str],
    num_generated: int | None = None,
) -> dict[str, Any]:
    """Return the ``usage`` member: tokens of prompts, of the prefix cache and of each modality.

    ``num_generated``: tokens generated; None where no text is generated.
    """
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    details = {"cached_tokens": sum(output.num_cached_tokens for output in outputs)}
    for modality in modalities:
        details[f"{modality}_tokens"] = sum(
            output.num_item_tokens.get(modality, 0) for output in outputs
        )
    return {
        "prompt_tokens": num_prompt,
        **({} if num_generated is None else {"completion_tokens": num_generated}),
        "total_tokens": num_prompt + (num_generated or 0),
        "prompt_tokens_details": details,
    }
