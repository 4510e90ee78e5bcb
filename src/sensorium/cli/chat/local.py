"""Client of an engine in this process."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

from sensorium.llm import LLM


class LocalModel:
    """A model in this process. Ctrl-C ends an answer between two tokens, a second one at once."""

    def __init__(self, **keywords: Any) -> None:
        self._llm = LLM(**keywords)
        self.name = self._llm.config.model.model

    def stream(
        self, messages: Sequence[Mapping[str, Any]], sampling: Mapping[str, Any]
    ) -> Iterator[str]:
        """Yield the answer piece by piece. Raises KeyboardInterrupt when Ctrl-C ended it."""
        defaults = self._llm.get_default_sampling_params()
        params = defaults.replace(**{"max_tokens": None, **sampling})
        sent = 0
        with (
            _interruptions() as interrupted,
            closing(self._llm.chat_stream(messages, params)) as outputs,
        ):
            for output in outputs:
                text = output.outputs[0].text
                yield text[sent:]
                sent = len(text)
                if interrupted:
                    raise KeyboardInterrupt

    def close(self) -> None:
        """Free the model."""
        self._llm.close()


@contextmanager
def _interruptions() -> Iterator[list[int]]:
    """Collect Ctrl-C, so that it does not interrupt a step of the engine; raise at the second."""
    caught: list[int] = []

    def catch(number: int, frame: object) -> None:
        if caught:  # the first token may be long in coming
            raise KeyboardInterrupt
        caught.append(number)

    before = signal.signal(signal.SIGINT, catch)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)
