"""Progress bar of a batch."""

from __future__ import annotations

import time
from contextlib import ExitStack

import numpy as np

from sensorium import progress
from sensorium.outputs import PoolingRequestOutput, RequestOutput


class Progress:
    """A bar over requests, with rates of input and output tokens.

    ``total`` is None for prompts of an iterator; no bar is made unless ``shown``.
    """

    def __init__(self, total: int | None, *, shown: bool) -> None:
        self._stack = ExitStack()
        self._bar: progress.TerminalBar | None = None
        if shown:
            bar = progress.bar("Requests", total, unit="requests", keep=True, delay=0.0)
            self._bar = self._stack.enter_context(bar)
        self._start = time.monotonic()
        self._num_input = 0
        self._num_output = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def done(self, output: RequestOutput | PoolingRequestOutput[np.ndarray]) -> None:
        """Count a finished request."""
        if self._bar is None:
            return
        self._num_input += len(output.prompt_token_ids)
        if isinstance(output, RequestOutput):
            self._num_output += sum(len(sample.token_ids) for sample in output.outputs)
        seconds = max(time.monotonic() - self._start, 1e-9)
        self._bar.set_postfix_str(
            f"input {self._num_input / seconds:.1f} tok/s, output {self._num_output / seconds:.1f} "
            "tok/s",
            refresh=False,
        )
        self._bar.update()
