"""Progress bar of a batch."""

from __future__ import annotations

import time

import numpy as np
from tqdm import tqdm

from sensorium.outputs import PoolingRequestOutput, RequestOutput


class Progress:
    """A tqdm bar over requests, with rates of input and output tokens.

    ``total`` is None for prompts of an iterator; no bar is made unless ``shown``.
    """

    def __init__(self, total: int | None, *, shown: bool) -> None:
        # A disabled bar would not do: it starts a thread.
        self._bar = tqdm(total=total, desc="Requests", dynamic_ncols=True) if shown else None
        self._start = time.monotonic()
        self._num_input = 0
        self._num_output = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

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
