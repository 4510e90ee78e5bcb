"""What one call of ``LLM`` asks for: its prompts, the values for each, and whose an error is."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sensorium.engine.prepared import Draft, PreparedPrompt
from sensorium.errors import InvalidRequestError, SensoriumError
from sensorium.outputs import PoolingRequestOutput
from sensorium.params import PoolingParams, SamplingParams

Value = TypeVar("Value")
Result = TypeVar("Result")
ParamsT = TypeVar("ParamsT", SamplingParams, PoolingParams)


@dataclass(slots=True)
class Job:
    """One prompt of a batch on its way to the engine."""

    index: int
    params: SamplingParams | PoolingParams
    prepared: concurrent.futures.Future[tuple[PreparedPrompt, str | None]]
    arrival_time: float


@dataclass(frozen=True, slots=True)
class Batch:
    """What one call asks for. ``several``: the prompts were a list, so that errors name the prompt's index."""

    drafts: Sequence[Draft]
    params: Sequence[SamplingParams] | Sequence[PoolingParams]
    several: bool


def apart(prompts: object) -> tuple[Sequence[Any], bool]:
    """The prompts of an argument that is one of them or a list; whether it is a list."""
    if isinstance(prompts, list | tuple) and not (prompts and isinstance(prompts[0], int)):
        return prompts, True
    return [prompts], False


def listed(params: object, num_prompts: int, kind: type[ParamsT], name: str) -> list[ParamsT]:
    """One ``kind`` for each prompt, of an argument that is one for all or a list. Raises InvalidRequestError."""
    if isinstance(params, kind):
        return [params] * num_prompts
    if isinstance(params, str | Mapping) or not isinstance(params, Sequence):
        raise InvalidRequestError(
            f"{name} must be a {kind.__name__} or a list of them, one per prompt; got {type(params).__name__}.",
            param=name,
        )
    values = list(params)
    if len(values) != num_prompts:
        raise InvalidRequestError(
            f"There are {num_prompts} prompts, but {len(values)} {name}: give one for all, or one per prompt.",
            param=name,
        )
    for index, value in enumerate(values):
        if not isinstance(value, kind):
            raise InvalidRequestError(
                f"{name}[{index}] must be a {kind.__name__}, got {type(value).__name__}.",
                param=name,
            )
    return values


def at_prompt(
    index: int, several: bool, function: Callable[[Value], Result], value: Value
) -> Result:
    """Call ``function``; an error of a prompt in a list says which one it is."""
    try:
        return function(value)
    except SensoriumError as error:
        if several:
            named = type(error)(f"Prompt {index}: {error.message}", param=error.param)
            named.index = index
            raise named from error
        raise


def distinct(values: Sequence[Value]) -> list[tuple[int, Value]]:
    """Each object among the values once, with its first index."""
    found: dict[int, tuple[int, Value]] = {}
    for index, value in enumerate(values):
        found.setdefault(id(value), (index, value))
    return list(found.values())


def batched(values: Sequence[Value], most: int) -> list[Sequence[Value]]:
    """The values in their order, so many at a time."""
    return [values[begin : begin + most] for begin in range(0, len(values), most)]


def fields_with(output: PoolingRequestOutput[Any], outputs: object) -> dict[str, Any]:
    """The fields of an output with its vector in another form."""
    known = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
    return {**known, "outputs": outputs}
