"""Ctrl-C while processes are still starting.

The caller hears of it, and no other process says anything.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.serving import tied_to_this_process
from tests.reliability.asking import PAUSE

PICTURE = """
llm.chat([{"role": "user", "content": [
    {"type": "image_url", "image_url": ImageAsset("stop_sign").data_url},
    {"type": "text", "text": "What is it?"},
]}])
"""
CONSTRAINT = """
llm.generate("a", SamplingParams(structured_outputs={"regex": "a+"}))
"""
SCRIPT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's are ignored
from sensorium import LLM, SamplingParams
from sensorium.assets import ImageAsset
llm = LLM("demo", num_kv_blocks=100)
print("ready", flush=True)
while True:  # so that it is there however late we look for what it starts
{call}
"""


def child(process: subprocess.Popen[bytes], module: str) -> psutil.Process | None:
    """The process of this module that ``process`` has started."""
    for one in psutil.Process(process.pid).children(recursive=True):
        try:
            if module in one.cmdline():
                return one
        except psutil.NoSuchProcess:
            continue
    return None


def heeds_interrupts(process: psutil.Process) -> bool:
    """Whether Python has put a handler for them, or they are blocked or ignored."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return True
    masks = [
        int(line.split()[1], 16) for line in lines if line[:6] in ("SigCgt", "SigIgn", "SigBlk")
    ]
    return any(mask >> (signal.SIGINT - 1) & 1 for mask in masks) or not masks


@pytest.mark.parametrize(
    ("call", "module"),
    [
        (PICTURE, "sensorium.engine.prompts.media_worker"),
        (CONSTRAINT, "sensorium.engine.grammar.worker"),
    ],
    ids=["media", "grammars"],
)
def test_ctrl_c_while_workers_start_prints_nothing_of_theirs(call: str, module: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(call=textwrap.indent(call, "    "))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a group of its own, to which a terminal would send
        preexec_fn=tied_to_this_process(),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    while (started := child(process, module)) is None:
        assert process.poll() is None
        time.sleep(PAUSE)
    while not heeds_interrupts(started):
        time.sleep(PAUSE)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert errors.count(b"KeyboardInterrupt") == 1, errors.decode()
    assert b"_worker" not in errors, errors.decode()
    assert f"{module.replace('.', '/')}.py" not in errors.decode(), errors.decode()
    assert process.returncode == -signal.SIGINT
    psutil.wait_procs([started], timeout=300)
    assert not started.is_running()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_right_after_the_start_stops_a_server_in_order(number: signal.Signals) -> None:
    """It comes as soon as the engine's process is there, before anything listens or heeds it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sensorium", "serve", "demo", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=tied_to_this_process(),
    )
    while (engine := child(process, "sensorium.engine.serving.worker")) is None:
        assert process.poll() is None
        time.sleep(PAUSE)
    folder = Path(engine.cmdline()[-1])
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    assert output == b""
    assert b"Traceback" not in errors
    psutil.wait_procs([engine], timeout=300)
    assert not engine.is_running()
    assert folder.name.startswith("sensorium-")
    assert not folder.exists()
