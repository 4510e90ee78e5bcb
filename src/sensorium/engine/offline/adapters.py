"""The adapters of one call of ``LLM`` or ``AsyncLLM``: which prompt runs with which."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sensorium.engine.engine import Engine
from sensorium.engine.offline.batch import BatchInput
from sensorium.engine.prompts.adapters import check_path, no_path
from sensorium.engine.prompts.types import Prompt
from sensorium.errors import ConfigError, InvalidRequestError, counted
from sensorium.params import LoRARequest

Parse = Callable[[Any], Prompt]


class AdaptersOnDemand:
    """Loads the adapters that calls name, and forgets those used least recently for others.

    Used by the thread that runs the engine.
    """

    def __init__(self, engine: Engine, max_loras: int) -> None:
        self._engine = engine
        self._max_loras = max_loras
        self._last_used = [adapter.name for adapter in engine.facts.adapters]

    def provide(self, requests: Sequence[LoRARequest]) -> None:
        """Load the adapters of a call. Raises InvalidRequestError and ConfigError."""
        wanted = {request.lora_name: request for request in requests}
        if len(wanted) > self._max_loras:
            raise ConfigError(
                f"The call uses {len(wanted)} adapters, but max_loras is {self._max_loras}: raise "
                "it, or use fewer at a time.",
                param="max_loras",
            )
        for request in requests:
            self._provide(request, wanted.keys())

    def _provide(self, request: LoRARequest, wanted: Any) -> None:
        name, path = request.lora_name, request.lora_path
        loaded = {adapter.name: adapter for adapter in self._engine.facts.adapters}
        if name not in loaded:
            if not path:
                raise no_path(name)
            self._load(name, path, wanted)
        else:
            check_path(name, path, [loaded[name].path])
        if name in self._last_used:
            self._last_used.remove(name)
        self._last_used.append(name)

    def _load(self, name: str, path: str, wanted: Any) -> None:
        """Load an adapter, and forget others where that makes room for it.

        Raises ConfigError. None is forgotten for one whose names, types or shapes are wrong.
        """
        folder, num_bytes = self._engine.adapter_bytes(name, path)
        for other in self._in_the_way(num_bytes, wanted):
            self._engine.unload_adapter(other)
            self._last_used.remove(other)
        self._engine.load_adapter(name, path, folder)

    def _in_the_way(self, num_bytes: int, wanted: Any) -> list[str]:
        """Return the adapters that must go for one of so many bytes, those used least recently.

        None where there is room, where some are in use, and where that would not suffice.
        """
        loaded, stats = self._engine.facts.adapters, self._engine.stats()
        unused = [name for name in self._last_used if name not in wanted]
        if stats.num_running or stats.num_waiting:
            unused = []
        for num in range(len(unused) + 1):
            going = unused[:num]
            left = {one.digest: one.num_bytes for one in loaded if one.name not in going}
            is_room = sum(left.values()) + num_bytes <= stats.lora_capacity_bytes
            if is_room and len(left) < self._max_loras:
                return going
        return []


def requests_of(given: object) -> list[LoRARequest | None]:
    """Return the adapters of a call: one for all prompts, or one of each.

    Raises InvalidRequestError for anything else.
    """
    found: list[LoRARequest | None] = []
    for entry in given if isinstance(given, list | tuple) else [given]:
        if entry is not None and not isinstance(entry, LoRARequest):
            raise InvalidRequestError(
                "lora_request must be a LoRARequest or a list of them, got "
                f"{type(entry).__name__}.",
                param="lora_request",
            )
        found.append(entry)
    return found


def adapting(parse: Parse, given: object, num_prompts: int | None) -> Parse:
    """Return ``parse`` that also gives each prompt its adapter.

    given: as for ``requests_of``. num_prompts: None where they come from an iterator. Raises
    InvalidRequestError for a list of another length.
    """
    entries = requests_of(given)
    if not isinstance(given, list | tuple):
        [one] = entries
        return parse if one is None else lambda value: with_adapter(parse(value), one)
    if num_prompts is not None and num_prompts != len(entries):
        raise InvalidRequestError(
            f"lora_request has {counted(len(entries), 'entry', 'entries')} for "
            f"{counted(num_prompts, 'prompt')}: give one for all, or one per prompt.",
            param="lora_request",
        )
    following: Iterator[LoRARequest | None] = iter(entries)

    def parse_next(value: Any) -> Prompt:
        prompt = parse(value)
        try:
            own = next(following)
        except StopIteration:
            raise InvalidRequestError(
                f"There are more prompts than entries of lora_request, {len(entries)}.",
                param="lora_request",
            ) from None
        return prompt if own is None else with_adapter(prompt, own)

    return parse_next


def using_adapters(batch: BatchInput, given: object) -> BatchInput:
    """Return the input of a call that loads adapters when it runs.

    given: as for ``requests_of``. Raises InvalidRequestError.
    """
    wanted = [request for request in requests_of(given) if request is not None]
    return dataclasses.replace(batch, adapters=tuple(wanted))


def with_adapter(prompt: Prompt, request: LoRARequest) -> Prompt:
    """Return a prompt that runs with an adapter."""
    media = dataclasses.replace(prompt.media, adapter=request.lora_name)
    return dataclasses.replace(prompt, media=media)
