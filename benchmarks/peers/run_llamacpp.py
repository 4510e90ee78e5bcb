"""llama.cpp's ``llama-server`` behind ``worker.py``: requests in flight at once are a batch."""

from __future__ import annotations

import atexit
import base64
import ctypes
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.peers.worker import Settings, run, settings_of
from benchmarks.peers.workload import Question

START_TIMEOUT = 600.0
ANSWER_TIMEOUT = 1800.0
SLOTS = 32
CONTEXT_TOKENS = 16384
"""Tokens of all slots together, in one cache that they share."""
PR_SET_PDEATHSIG = 1


class LlamaCppEngine:
    """The server's own defaults but for threads, slots, context and no warm-up of its own."""

    def __init__(self, settings: Settings) -> None:
        folder = settings.home / "llama" / settings.cpu / "bin"
        weights = settings.home / "gguf"
        model = weights / f"{settings.checkpoint.name}-{settings.format}.gguf"
        self._port = _free_port()
        command = [folder / "llama-server", "--model", model, "--port", self._port]
        command += ["--threads", settings.num_threads, "--threads-batch", settings.num_threads]
        command += ["--parallel", SLOTS, "--ctx-size", CONTEXT_TOKENS, "--kv-unified"]
        command += ["--no-warmup"]
        if settings.has_vision:
            command += ["--mmproj", weights / f"{settings.checkpoint.name}-mmproj-f16.gguf"]
        self._server = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            stderr=sys.stderr,
            preexec_fn=_end_with_parent,
        )
        atexit.register(self._end)
        self._wait()
        self._clients = ThreadPoolExecutor(SLOTS)
        self.name = f"llama.cpp {self._get('/props').get('build_info', 'of an unknown build')}"

    def complete(self, prompts: list[list[int]], num_new: int) -> list[int]:
        bodies = [
            {"prompt": ids, "n_predict": num_new, "ignore_eos": True, "temperature": 0}
            for ids in prompts
        ]
        found = self._clients.map(lambda body: self._post("/completion", body), bodies)
        return [answer["tokens_predicted"] for answer in found]

    def answer(self, questions: list[Question], num_new: int) -> list[int]:
        bodies = [_chat(question, num_new) for question in questions]
        found = self._clients.map(lambda body: self._post("/v1/chat/completions", body), bodies)
        return [answer["usage"]["completion_tokens"] for answer in found]

    def _wait(self) -> None:
        end = time.monotonic() + START_TIMEOUT
        while time.monotonic() < end:
            if self._server.poll() is not None:
                raise RuntimeError(f"llama-server ended with status {self._server.returncode}")
            try:
                self._get("/health")
            except (OSError, RuntimeError):
                time.sleep(0.02)
            else:
                return
        raise RuntimeError(f"llama-server was not ready within {START_TIMEOUT:g} s")

    def _end(self) -> None:
        self._server.terminate()
        try:
            self._server.wait(10)
        except subprocess.TimeoutExpired:
            self._server.kill()

    def _get(self, path: str) -> Any:
        return self._request("GET", path, None)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._request("POST", path, json.dumps(body))

    def _request(self, method: str, path: str, body: str | None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=ANSWER_TIMEOUT)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise RuntimeError(f"{path}: {response.status} {text[:300]!r}")
        return json.loads(text)


def _chat(question: Question, num_new: int) -> dict[str, Any]:
    file = io.BytesIO()
    question.picture.save(file, "PNG", compress_level=1)
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": question.text},
    ]
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": num_new,
        "ignore_eos": True,
        "temperature": 0,
    }


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


def _end_with_parent() -> None:
    """Have the server killed when this process is: its end would not reach it otherwise."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    run(settings_of(), LlamaCppEngine)
