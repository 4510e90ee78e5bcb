"""The arguments of one call of ``LLM``: its prompts, and the parameters and priority of each."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch

from sensorium.engine.prompts.files import has_files
from sensorium.engine.prompts.input_processor import InputProcessor
from sensorium.engine.prompts.types import Prompt
from sensorium.errors import InvalidRequestError, counted, located
from sensorium.multimodal.workers.event_loop import LoopThread
from sensorium.outputs import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from sensorium.params import LoRARequest, PoolingParams, SamplingParams
from sensorium.text.chat.chat_template import RenderedPrompt

Value = TypeVar("Value")
Result = TypeVar("Result")
ParamsT = TypeVar("ParamsT", SamplingParams, PoolingParams)

MAX_PRIORITY = 1 << 31

COMPILED_AT_ONCE = 64
"""Constraints that are compiled at a time, so that none waits long in the queue of the helper."""


class Prompts(NamedTuple):
    """The prompts of a call. ``several``: they came as a list or an iterable, not one alone."""

    values: Iterable[Any]
    several: bool


class BatchPrompt(NamedTuple):
    """A prompt of a batch, checked as far as that goes without its media.

    ``rendered`` is None for a conversation with files: what media they hold shows when it runs.
    """

    prompt: Prompt
    rendered: RenderedPrompt | None
    params: SamplingParams | PoolingParams


@dataclass(frozen=True, slots=True)
class BatchInput:
    """The checked input of one call.

    Attributes:
        prompts: The prompts, in the order in which they run.
        several: The caller gave a list or an iterable: errors name the prompt's index.
        total: Number of prompts; None when they are read from an iterator while others run.
        priority: That of all prompts, or of each.
        order: Index of each prompt in the caller's order, where that is not the order of
            ``prompts``.
        adapters: Those that the prompts name, which are loaded when the call runs.
    """

    prompts: Iterator[BatchPrompt]
    several: bool
    total: int | None
    priority: int | Sequence[int] = 0
    order: Sequence[int] | None = None
    adapters: Sequence[LoRARequest] = ()

    def index_of(self, number: int) -> int:
        """Return the caller's index of the prompt that is read as the ``number``-th, from 0."""
        return number if self.order is None else self.order[number]

    def priority_of(self, index: int) -> int:
        """Return the priority of the prompt with this index."""
        return self.priority if isinstance(self.priority, int) else self.priority[index]

    def error_index(self, index: int) -> int | None:
        """Return the index that an error of a prompt names; None for a prompt alone."""
        return index if self.several else None


class BatchBuilder:
    """Checks the arguments of a call as far as that goes without loading media."""

    def __init__(self, input_processor: InputProcessor, loop: LoopThread) -> None:
        self._input_processor = input_processor
        self._loop = loop

    def text(
        self,
        prompts: Prompts,
        parse: Callable[[Any], Prompt],
        params: object,
        priority: int | Sequence[int] | None = None,
    ) -> BatchInput:
        """Return the input of a call that generates text. Raises RequestError."""
        if params is None:
            params = SamplingParams(**self._input_processor.default_params)
        batch = self._batch(prompts, parse, params, SamplingParams, self._checked_sampling)
        return prioritized(batch, priority)

    def embeddings(
        self, prompts: Prompts, parse: Callable[[Any], Prompt], params: object
    ) -> BatchInput:
        """Return the input of a call that makes embeddings. Raises RequestError."""

        def resolved(each: list[PoolingParams], several: bool) -> list[PoolingParams]:
            return [self._input_processor.resolve_pooling(one) for one in each]

        params = PoolingParams() if params is None else params
        return self._batch(prompts, parse, params, PoolingParams, resolved)

    def _batch(
        self,
        prompts: Prompts,
        parse: Callable[[Any], Prompt],
        params: object,
        kind: type[ParamsT],
        check: Callable[[list[ParamsT], bool], list[ParamsT]],
    ) -> BatchInput:
        name = "sampling_params" if kind is SamplingParams else "pooling_params"
        values, several = prompts
        if not isinstance(values, list | tuple):
            each = one_by_one(params, kind, name, lambda one: check([one], False)[0])
            return BatchInput(self._read(values, parse, each), True, None)
        found = check(per_prompt(params, len(values), kind, name), not isinstance(params, kind))
        parsed = _each(parse, values, several)
        rendered = _each(self._rendered, parsed, several)
        return BatchInput(map(BatchPrompt, parsed, rendered, found), several, len(values))

    def _read(
        self,
        values: Iterable[Any],
        parse: Callable[[Any], Prompt],
        params: Iterator[SamplingParams | PoolingParams],
    ) -> Iterator[BatchPrompt]:
        """Parse and render the prompts of an iterator when they are asked for."""
        for index, value in enumerate(values):
            with located(prompt=index):
                prompt = parse(value)
                rendered = self._rendered(prompt)
                found = BatchPrompt(prompt, rendered, next(params))
            yield found

    def _rendered(self, prompt: Prompt) -> RenderedPrompt | None:
        return None if has_files(prompt) else self._input_processor.render(prompt)

    def _checked_sampling(self, each: list[SamplingParams], several: bool) -> list[SamplingParams]:
        """Check each object once, and compile its constraint."""
        different = unique(each)
        for index, one in different:
            with located(prompt=index if several else None):
                self._input_processor.check_params(one)
        constrained = [(index, one) for index, one in different if one.structured_outputs]
        for begin in range(0, len(constrained), COMPILED_AT_ONCE):
            some = constrained[begin : begin + COMPILED_AT_ONCE]
            compiled = [self._loop.submit(self._input_processor.grammar(one)) for _, one in some]
            concurrent.futures.wait(compiled)
            for (index, _), grammar in zip(some, compiled, strict=True):
                with located(prompt=index if several else None):
                    grammar.result()
        return each


def _each(
    function: Callable[[Value], Result], values: Iterable[Value], several: bool
) -> list[Result]:
    found = []
    for index, value in enumerate(values):
        with located(prompt=index if several else None):
            found.append(function(value))
    return found


def as_list(prompts: object) -> Prompts:
    """Return the prompts of an argument that is one of them, a list or an iterable."""
    if isinstance(prompts, list | tuple):
        alone = bool(prompts) and isinstance(prompts[0], int)
    else:
        alone = not isinstance(prompts, Iterable) or isinstance(prompts, str | bytes | Mapping)
    return Prompts([prompts], False) if alone else Prompts(cast("Iterable[Any]", prompts), True)


def conversations(messages: object) -> Prompts:
    """Return the conversations of an argument, as ``as_list``; one is a sequence of mappings."""
    if isinstance(messages, Iterator):
        return Prompts(messages, True)
    if isinstance(messages, list | tuple) and messages and not isinstance(messages[0], Mapping):
        return Prompts(messages, True)
    lazy = isinstance(messages, Iterable) and not isinstance(messages, str | Mapping | Sequence)
    return Prompts(cast("Iterable[Any]", messages), True) if lazy else Prompts([messages], False)


def prioritized(batch: BatchInput, priority: int | Sequence[int] | None) -> BatchInput:
    """Return the batch with priorities; lower ones run first, equal ones in the caller's order.

    ``priority`` is that of all prompts, or a list with one for each. Raises InvalidRequestError.
    """
    if priority is None:
        return batch
    if not isinstance(priority, Sequence) or isinstance(priority, str):
        return dataclasses.replace(batch, priority=_checked_priority(priority))
    if batch.total != len(priority):
        there = "an iterator's" if batch.total is None else str(batch.total)
        raise InvalidRequestError(
            f"priority has {len(priority)} entries for {there} prompts: give one for all, or one "
            "for each of a list.",
            param="priority",
        )
    each = [_checked_priority(value) for value in priority]
    order = sorted(range(len(each)), key=each.__getitem__)
    prompts = list(batch.prompts)
    in_order = iter([prompts[index] for index in order])
    return dataclasses.replace(batch, prompts=in_order, priority=each, order=order)


def _checked_priority(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > MAX_PRIORITY:
        raise InvalidRequestError(
            f"priority must be an integer between {-MAX_PRIORITY} and {MAX_PRIORITY}, "
            f"got {value!r:.80}.",
            param="priority",
        )
    return value


def one_by_one(
    params: object, kind: type[ParamsT], name: str, check: Callable[[ParamsT], ParamsT]
) -> Iterator[ParamsT]:
    """Return an iterator of parameters for prompts that are read from an iterator.

    ``params`` is one for all, or an iterable. Raises InvalidRequestError: at once for an argument
    that is neither, at its place for an entry that is wrong or missing.
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
        f"There are more prompts than {name}, of which there are {count}: give one for all, or one "
        "per prompt.",
        param=name,
    )


def per_prompt(params: object, num_prompts: int, kind: type[ParamsT], name: str) -> list[ParamsT]:
    """Return the parameters of each prompt, of an argument that is one for all or a list.

    Raises InvalidRequestError.
    """
    if isinstance(params, kind):
        return [params] * num_prompts
    if isinstance(params, str | Mapping) or not isinstance(params, Sequence):
        raise _not_params(params, kind, name)
    values = list(params)
    if len(values) != num_prompts:
        raise InvalidRequestError(
            f"{name} has {counted(len(values), 'entry', 'entries')} for "
            f"{counted(num_prompts, 'prompt')}: give one for all, or one per prompt.",
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
        f"{name} must be a {kind.__name__} or a list of them, one per prompt; "
        f"got {type(params).__name__}.",
        param=name,
    )


def unique(values: Sequence[Value]) -> list[tuple[int, Value]]:
    """Return each object among the values once, with its first index."""
    found: dict[int, tuple[int, Value]] = {}
    for index, value in enumerate(values):
        found.setdefault(id(value), (index, value))
    return list(found.values())


def unchanged(output: RequestOutput) -> RequestOutput:
    """Return the output as it is."""
    return output


def as_embedding(output: PoolingRequestOutput[np.ndarray]) -> EmbeddingRequestOutput:
    """Return the output with its embedding as a list of numbers."""
    return EmbeddingRequestOutput(**_fields(output, EmbeddingOutput(output.outputs.tolist())))


def as_tensor(output: PoolingRequestOutput[np.ndarray]) -> PoolingRequestOutput[PoolingOutput]:
    """Return the output with its embedding as a tensor (dimensions,) float32."""
    return PoolingRequestOutput(**_fields(output, PoolingOutput(torch.from_numpy(output.outputs))))


def as_array(output: PoolingRequestOutput[np.ndarray]) -> PoolingRequestOutput[np.ndarray]:
    """Return the output as it is, its embedding an array (dimensions,) float32."""
    return output


def as_scores(
    left: Sequence[PoolingRequestOutput[np.ndarray]],
    right: Sequence[PoolingRequestOutput[np.ndarray]],
) -> list[ScoringRequestOutput]:
    """Return the similarities of pairs, or of one prompt with each of the others.

    The embeddings have length 1.
    """
    firsts = left if len(left) == len(right) else [left[0]] * len(right)
    return [_scored(one, other) for one, other in zip(firsts, right, strict=True)]


def _scored(
    one: PoolingRequestOutput[np.ndarray], other: PoolingRequestOutput[np.ndarray]
) -> ScoringRequestOutput:
    cosine = float(one.outputs.astype(np.float64) @ other.outputs.astype(np.float64))
    items = Counter(one.num_item_tokens) + Counter(other.num_item_tokens)
    return ScoringRequestOutput(
        request_id=f"{one.request_id}_{other.request_id}",
        outputs=ScoringOutput(min(1.0, max(-1.0, cosine))),
        prompt_token_ids=[*one.prompt_token_ids, *other.prompt_token_ids],
        num_cached_tokens=one.num_cached_tokens + other.num_cached_tokens,
        num_item_tokens=dict(items),
        index=other.index,
    )


def _fields(output: PoolingRequestOutput[Any], outputs: object) -> dict[str, Any]:
    known = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
    return {**known, "outputs": outputs}
