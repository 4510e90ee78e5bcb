"""What one call of ``LLM`` asks for: its prompts, the values for each, and whose an error is."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch

from sensorium.engine.prompts.types import PreparedPrompt, Prompt
from sensorium.errors import InvalidRequestError, counted, located
from sensorium.outputs import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
)
from sensorium.params import PoolingParams, SamplingParams
from sensorium.text.chat.chat_template import RenderedPrompt
from sensorium.text.grammar.library import Grammar
from sensorium.tracing import RequestTrace

Value = TypeVar("Value")
Result = TypeVar("Result")
ParamsT = TypeVar("ParamsT", SamplingParams, PoolingParams)

MAX_PRIORITY = 1 << 31


class BatchPrompt(NamedTuple):
    """A prompt of a call, checked as far as that goes without its media."""

    prompt: Prompt
    rendered: RenderedPrompt
    params: SamplingParams | PoolingParams


@dataclass(slots=True)
class PendingPrompt:
    """A prompt that is being prepared for the engine."""

    index: int
    params: SamplingParams | PoolingParams
    prepared: concurrent.futures.Future[tuple[PreparedPrompt, Grammar | None]]
    arrival_time: float
    request_id: str
    priority: int = 0
    trace: RequestTrace | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """What one call asks for. ``several``: the prompts were not one alone, so that errors name the prompt's index.

    ``total``: how many prompts there are; None where they are read from an iterator while earlier ones run.
    ``priority``: of all prompts, or of each; ``order``: the places of the prompts in the order in which they come,
    where that is not the caller's.
    """

    prompts: Iterator[BatchPrompt]
    several: bool
    total: int | None
    priority: int | Sequence[int] = 0
    order: Sequence[int] | None = None

    def place(self, number: int) -> int:
        """Return the caller's index of the prompt that is read as the ``number``-th, from 0."""
        return number if self.order is None else self.order[number]

    def priority_at(self, place: int) -> int:
        """Return the priority of the prompt with this index."""
        return self.priority if isinstance(self.priority, int) else self.priority[place]


def apart(prompts: object) -> tuple[Iterable[Any], bool]:
    """The prompts of an argument that is one of them, a list, or an iterable to be read late; False for one alone."""
    if isinstance(prompts, list | tuple):
        alone = bool(prompts) and isinstance(prompts[0], int)
    else:
        alone = not isinstance(prompts, Iterable) or isinstance(prompts, str | bytes | Mapping)
    return ([prompts], False) if alone else (cast("Iterable[Any]", prompts), True)


def conversations(messages: object) -> tuple[Iterable[Any], bool]:
    """The same for conversations, one of which is a sequence of mappings."""
    if isinstance(messages, Iterator):
        return messages, True
    if isinstance(messages, list | tuple) and messages and not isinstance(messages[0], Mapping):
        return messages, True
    late = isinstance(messages, Iterable) and not isinstance(messages, str | Mapping | Sequence)
    return (cast("Iterable[Any]", messages), True) if late else ([messages], False)


def prioritized(batch: Batch, priority: int | Sequence[int] | None) -> Batch:
    """Return the batch with priorities, lower ones first, those that are equal in the order of the prompts.

    priority: of all prompts, or a list with one for each. Raises InvalidRequestError.
    """
    if priority is None:
        return batch
    if not isinstance(priority, Sequence) or isinstance(priority, str):
        return dataclasses.replace(batch, priority=_checked_priority(priority))
    if batch.total != len(priority):
        there = "an iterator's" if batch.total is None else str(batch.total)
        raise InvalidRequestError(
            f"priority has {len(priority)} entries for {there} prompts: give one for all, or one for each of a list.",
            param="priority",
        )
    each = [_checked_priority(value) for value in priority]
    order = sorted(range(len(each)), key=each.__getitem__)
    prompts = list(batch.prompts)
    sorted_prompts = iter([prompts[place] for place in order])
    return dataclasses.replace(batch, prompts=sorted_prompts, priority=each, order=order)


def _checked_priority(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > MAX_PRIORITY:
        raise InvalidRequestError(
            f"priority must be an integer between {-MAX_PRIORITY} and {MAX_PRIORITY}, got {value!r:.80}.",
            param="priority",
        )
    return value


def is_read_late(prompts: Iterable[Any]) -> bool:
    """Whether prompts are read one by one while earlier ones run."""
    return not isinstance(prompts, list | tuple)


def each_with(
    params: object, kind: type[ParamsT], name: str, check: Callable[[ParamsT], ParamsT]
) -> Iterator[ParamsT]:
    """One ``kind`` after the other, for prompts that are read late: of one for all, or as many as an iterable has.

    Raises InvalidRequestError: at once for an argument that is neither, at the place of one that is wrong or missing.
    """
    if isinstance(params, kind):
        return itertools.repeat(check(params))
    if isinstance(params, str | Mapping) or not isinstance(params, Iterable):
        raise _not_params(params, kind, name)
    return _checked_each(params, kind, name, check)


def _checked_each(
    params: Iterable[object], kind: type[ParamsT], name: str, check: Callable[[ParamsT], ParamsT]
) -> Iterator[ParamsT]:
    count = 0
    for count, value in enumerate(params, 1):
        yield check(_checked(value, count - 1, kind, name))
    raise InvalidRequestError(
        f"There are more prompts than {name}, of which there are {count}: give one for all, or one per prompt.",
        param=name,
    )


def listed(params: object, num_prompts: int, kind: type[ParamsT], name: str) -> list[ParamsT]:
    """One ``kind`` for each prompt, of an argument that is one for all or a list. Raises InvalidRequestError."""
    if isinstance(params, kind):
        return [params] * num_prompts
    if isinstance(params, str | Mapping) or not isinstance(params, Sequence):
        raise _not_params(params, kind, name)
    values = list(params)
    if len(values) != num_prompts:
        raise InvalidRequestError(
            f"{name} has {counted(len(values), 'entry', 'entries')} for {counted(num_prompts, 'prompt')}: give one for "
            "all, or one per prompt.",
            param=name,
        )
    return [_checked(value, index, kind, name) for index, value in enumerate(values)]


def _checked(value: object, index: int, kind: type[ParamsT], name: str) -> ParamsT:
    if not isinstance(value, kind):
        raise InvalidRequestError(
            f"{name}[{index}] must be a {kind.__name__}, got {type(value).__name__}.", param=name
        )
    return value


def _not_params(params: object, kind: type[ParamsT], name: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{name} must be a {kind.__name__} or a list of them, one per prompt; got {type(params).__name__}.",
        param=name,
    )


def at_prompt(
    index: int, several: bool, function: Callable[[Value], Result], value: Value
) -> Result:
    """Call ``function``; an error of a prompt in a list says which one it is."""
    with located(prompt=index if several else None):
        return function(value)


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


def unchanged(output: RequestOutput) -> RequestOutput:
    """The output as it is."""
    return output


def as_embedding(output: PoolingRequestOutput[np.ndarray]) -> EmbeddingRequestOutput:
    """The output with its vector as a list of numbers."""
    return EmbeddingRequestOutput(**fields_with(output, EmbeddingOutput(output.outputs.tolist())))


def as_tensor(output: PoolingRequestOutput[np.ndarray]) -> PoolingRequestOutput[PoolingOutput]:
    """The output with its vector as a tensor (dimensions,) float32."""
    return PoolingRequestOutput(
        **fields_with(output, PoolingOutput(torch.from_numpy(output.outputs)))
    )
