"""Running the prompts of one request on the engine, and the numbers that answers report of them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sensorium.errors import RequestError, UnavailableError
from sensorium.outputs import RequestOutput
from sensorium.params import SamplingParams
from sensorium.server.admission import Place
from sensorium.server.context import ServingContext

if TYPE_CHECKING:
    from sensorium.engine.prompts.types import Prompt


@dataclass(frozen=True, slots=True)
class Job:
    """The prompts of one HTTP request, which share everything else.

    ``constraint_param``: the field that a constraint on the answer came from, for errors and ``warnings`` about it.
    ``spelled``: how the client writes places of the body that came from vLLM's words.
    """

    prompts: Sequence[Prompt]
    params: SamplingParams
    request_id: str
    priority: int = 0
    constraint_param: str = "structured_outputs"
    spelled: Mapping[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def headers(self) -> dict[str, str]:
        """What the answer's headers say besides: the warnings that have come so far."""
        return {"X-Sensorium-Warning": "; ".join(self.warnings)} if self.warnings else {}

    def client_place(self, place: str) -> str:
        """The field of the body that a place in a constraint comes from."""
        if self.constraint_param == "structured_outputs" or place in _OPTIONS:
            return self.spelled.get(place, place)
        call = _IN_CALLS.search(place)
        if self.constraint_param == "tools" and call is not None:
            return f"tools[{call[1]}].function.parameters"
        return self.constraint_param


Step = tuple[int, RequestOutput]

_OPTIONS = frozenset(
    f"structured_outputs.{name}" for name in ("whitespace", "whitespace_pattern", "unsupported")
)
"""Fields that are their own, whichever field a constraint comes from."""
_IN_CALLS = re.compile(r"\.items\.anyOf\[(\d+)\]$")


async def run_job(context: ServingContext, job: Job) -> AsyncGenerator[Step, None]:
    """Yield (position of the prompt, its output so far) for each piece of news.

    The first error of any prompt ends all of them, and so does closing the generator. Raises
    OverloadedError at once when there is no room.
    """
    entering = context.admission.enter(len(job.prompts), num_samples=job.params.n)
    with entering as places, _constraint_named(job):
        if len(job.prompts) == 1:
            async with aclosing(_outputs(context, job, 0, places[0])) as outputs:
                async for output in outputs:
                    yield 0, output
        else:
            async with aclosing(_merged(context, job, places)) as steps:
                async for step in steps:
                    yield step


async def finished_outputs(context: ServingContext, job: Job) -> list[RequestOutput]:
    """The complete outputs of all prompts, in order."""
    async with aclosing(run_job(context, job)) as steps:
        done = {index: output async for index, output in steps}
    return [done[index] for index in range(len(job.prompts))]


async def _outputs(
    context: ServingContext, job: Job, index: int, place: Place
) -> AsyncGenerator[RequestOutput, None]:
    """The outputs of one prompt, whose samples leave the queue with their first tokens."""
    stream = context.frontend.generate(
        job.prompts[index],
        job.params,
        request_id=context.engine_id(job.request_id),
        priority=job.priority,
    )
    async with aclosing(stream) as outputs:
        async for output in outputs:
            if place.num_held:
                place.keep(sum(not (s.token_ids or s.finished) for s in output.outputs))
            if any(sample.finish_reason == "error" for sample in output.outputs):
                raise UnavailableError("The engine could not finish this request; try again.")
            if output.warnings and not job.warnings:
                job.warnings.extend(_renamed(warning, job) for warning in output.warnings)
            yield output


def _renamed(warning: str, job: Job) -> str:
    place, colon, what = warning.partition(":")
    return f"{job.client_place(place)}{colon}{what}"


@contextmanager
def _constraint_named(job: Job) -> Iterator[None]:
    """Let errors about a constraint point at the field of the body that asked for it."""
    try:
        yield
    except RequestError as error:
        place = error.param or ""
        if place.startswith("structured_outputs"):
            error.param = job.client_place(place)
            error.message = error.message.replace(place, error.param, 1)
        raise


async def _merged(
    context: ServingContext, job: Job, places: Sequence[Place]
) -> AsyncGenerator[Step, None]:
    """The outputs of several prompts as they come."""
    news: asyncio.Queue[Step | BaseException | None] = asyncio.Queue(2 * len(places))

    async def follow(index: int) -> None:
        try:
            async with aclosing(_outputs(context, job, index, places[index])) as outputs:
                async for output in outputs:
                    await news.put((index, output))
            await news.put(None)
        except Exception as error:
            await news.put(error)

    tasks = [asyncio.create_task(follow(index)) for index in range(len(places))]
    try:
        num_open = len(tasks)
        while num_open:
            step = await news.get()
            if step is None:
                num_open -= 1
            elif isinstance(step, BaseException):
                raise step
            else:
                yield step
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def num_values(outputs: Iterable[RequestOutput]) -> int:
    """About how many values the answer that tells all of ``outputs`` has: its choices and the log probabilities."""
    return sum(
        sum(1 + sum(map(len, sample.logprobs or ())) for sample in output.outputs)
        + sum(len(entry) for entry in output.prompt_logprobs or () if entry is not None)
        for output in outputs
    )


def usage(
    outputs: Iterable[RequestOutput], modalities: Iterable[str], *, num_hidden: int = 0
) -> dict[str, Any]:
    """The ``usage`` member: tokens of prompts and samples, those from the prefix cache, those of
    each modality.

    ``num_hidden``: generated tokens of each sample that the answer does not show.
    """
    outputs = list(outputs)
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_generated = sum(
        max(0, len(sample.token_ids) - num_hidden)
        for output in outputs
        for sample in output.outputs
    )
    details = {"cached_tokens": sum(output.num_cached_tokens for output in outputs)}
    for modality in modalities:
        details[f"{modality}_tokens"] = sum(
            output.num_item_tokens.get(modality, 0) for output in outputs
        )
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": details,
    }
