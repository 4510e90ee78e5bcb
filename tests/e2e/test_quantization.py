"""The demo served with quantized weights: it still answers, and the log says what they take."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from training.evaluate import draw_questions

from tests.e2e.serving import Server


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_demo(tmp_path: Path, name: str) -> None:
    flags = ["--quantization", name, "--quantization-towers", "int8", "--num-kv-blocks", "400"]
    server = Server("demo", tmp_path / "log", [*flags, "--max-model-len", "512"])
    questions = [question for question in draw_questions(4) if question.media is not None][:10]
    try:
        right = 0
        for question in questions:
            file = io.BytesIO()
            question.media.save(file, "PNG")
            url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            parts = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": question.text},
            ]
            body = {"model": "demo", "messages": [{"role": "user", "content": parts}]}
            request = urllib.request.Request(
                f"{server.url}/v1/chat/completions",
                json.dumps({**body, "temperature": 0, "max_tokens": 48}).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request) as response:
                answer = json.load(response)["choices"][0]["message"]["content"]
            right += answer.strip() == question.answer
    finally:
        assert server.stop() == 0
    assert right >= 7
    log = (tmp_path / "log").read_text()
    assert "weights of linear layers and embeddings in memory: " in log
    assert f"MiB {name}" in log


def test_a_wrong_format_ends_the_command() -> None:
    command = [sys.executable, "-m", "sensorium", "serve", "demo", "--quantization", "int3"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 2
    assert "--quantization" in ended.stderr
    assert "int8" in ended.stderr
