"""An ``LLM`` that nobody holds any more leaves nothing.

No thread, no process, no descriptor, no warning.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

from tests.checkpoints import make_qwen2_vl

SCRIPT = """
    import base64, gc, io, json, os, sys, threading, time
    from pathlib import Path

    import psutil
    from PIL import Image

    from sensorium import LLM, SamplingParams

    GREEDY = SamplingParams(temperature=0, max_tokens=4)
    file = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(file, "PNG")
    URL = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


    def message(part):
        return [{"role": "user", "content": [part]}]


    TEXT = message({"type": "text", "text": "hello"})


    def new():
        return LLM(sys.argv[1], num_kv_blocks=64, block_size=16, max_model_len=256)


    def unused():
        new()


    def after_text():
        new().generate("hello", GREEDY, use_tqdm=False)


    def after_all(llm=None):
        llm = llm or new()
        llm.chat(message({"type": "image_url", "image_url": {"url": URL}}), GREEDY, use_tqdm=False)
        picture = {"type": "image_pil", "image_pil": Image.new("RGB", (50, 50))}
        llm.chat(message(picture), GREEDY, use_tqdm=False)
        llm.generate(
            "hello",
            GREEDY.replace(structured_outputs={"choice": ["red", "blue"]}),
            use_tqdm=False,
        )


    def in_an_answer():
        next(new().chat_stream(TEXT, GREEDY))


    def after_its_last_answer():
        assert len(list(new().chat_stream(TEXT, GREEDY))) == 4


    def after_an_error():
        try:
            new().generate("", GREEDY, use_tqdm=False)
        except ValueError:
            pass


    def in_a_thread():
        thread = threading.Thread(target=after_all)
        thread.start()
        thread.join()


    def closed():
        llm = new()
        after_all(llm)
        llm.close()


    def closed_and_held():
        llm = new()
        after_all(llm)
        llm.close()
        kept.append(llm)


    def held():
        me = psutil.Process()
        until = time.monotonic() + 60  # threads that were told to end may need a moment
        while threading.active_count() > 1 and time.monotonic() < until:
            time.sleep(0.01)
        threads = sorted(t.name for t in threading.enumerate())
        return [threads, len(os.listdir("/proc/self/fd")), [p.name() for p in me.children(True)]]


    closed()  # what libraries keep for the process is there now
    gc.collect()
    before, after, kept = held(), {}, []
    for use in (
        unused, after_text, after_all, in_an_answer, after_its_last_answer, after_an_error, in_a_thread, closed_and_held
    ):
        use()
        gc.collect()
        after[use.__name__] = held()
    print(json.dumps([before, after]))
    end = new()  # ends with the process
    after_all(end)
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    folder = make_qwen2_vl(tmp_path_factory.mktemp("qwen2_vl"))
    script = tmp_path_factory.mktemp("script") / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    return subprocess.run(
        [sys.executable, "-X", "dev", str(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


USES = (
    "unused",
    "after_text",
    "after_all",
    "in_an_answer",
    "after_its_last_answer",
    "after_an_error",
    "in_a_thread",
    "closed_and_held",
)


@pytest.mark.parametrize("use", USES)
def test_nothing_is_left(ended: subprocess.CompletedProcess[str], use: str) -> None:
    """Threads by name, the number of descriptors, and processes are those of before."""
    assert ended.stdout, ended.stderr
    before, after = json.loads(ended.stdout)
    assert before[0] == ["MainThread"]
    assert before[2] == []
    assert after[use] == before


def test_nothing_is_said(ended: subprocess.CompletedProcess[str]) -> None:
    """Python's development mode tells of every socket, loop and process that was not closed."""
    assert ended.returncode == 0, ended.stderr
    own = [line for line in ended.stderr.splitlines() if "Warning" in line or "Error" in line]
    assert own == []
