"""The model in the program's own process: an answer in pieces, and Ctrl-C."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from sensorium.cli.chat.local import LocalModel

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def model() -> Iterator[LocalModel]:
    made = LocalModel(model="demo", num_kv_blocks=64, max_num_seqs=2, num_threads=1)
    yield made
    made.close()


def test_an_answer_in_pieces(model: LocalModel) -> None:
    pieces = list(model.stream(MESSAGES, {"max_tokens": 5, "ignore_eos": True, "temperature": 0.0}))
    assert 1 < len(pieces) <= 5
    assert model.name == "demo"


def test_ctrl_c_ends_it_between_two_tokens_and_a_second_one_at_once(model: LocalModel) -> None:
    before = signal.getsignal(signal.SIGINT)
    for presses in (1, 2):
        answer = model.stream(MESSAGES, {"max_tokens": 500, "ignore_eos": True})
        next(answer)
        os.kill(os.getpid(), signal.SIGINT)
        if presses == 2:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            next(answer)
        assert signal.getsignal(signal.SIGINT) is before
    assert list(model.stream(MESSAGES, {"max_tokens": 2})), "the next answer comes"
