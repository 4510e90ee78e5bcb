"""vLLM's flags and keywords.

Each does the same, does nothing and says so, or is refused with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from sensorium.cli.flags import build_engine_config, build_server_config, flag_of
from sensorium.cli.from_vllm import from_vllm_markdown
from sensorium.cli.main import build_parser, main
from sensorium.cli.rewrite import SHORT
from sensorium.compat.engine_flags import ENGINE_RULES
from sensorium.compat.rule import Effect
from sensorium.compat.server_flags import SERVER_RULES
from sensorium.config import ServerConfig, engine_config, engine_option_names
from sensorium.errors import ConfigError
from tests.compat.vllm_names import FLAGS

ROOT = Path(__file__).parents[2]
RULES = ENGINE_RULES | SERVER_RULES


def parse(*argv: str, command: str = "serve") -> argparse.Namespace:
    return build_parser().parse_args([command, *argv])


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_of_vllms_is_known(flag: str) -> None:
    ours = {f"--{name.replace('_', '-')}" for name in engine_option_names()}
    served = {action for a in _serve_actions() for action in a.option_strings}
    rule = RULES.get(flag.replace("-", "_"))
    assert f"--{flag}" in ours | served or flag == "config" or rule is not None, flag
    if rule is not None:
        assert f"--{flag}" not in ours | served, "a flag of ours needs no rule"
        assert rule.why


@functools.cache
def _serve_actions() -> list[argparse.Action]:
    [commands] = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return list(commands.choices["serve"]._actions)


EVERYDAY = (
    "demo --enable-auto-tool-choice --tool-call-parser hermes --reasoning-parser qwen3 "
    "--disable-log-requests "
    "--uvicorn-log-level warning -tp 1 --pipeline-parallel-size 1 --swap-space 4 --kv-cache-dtype "
    "auto "
    "--generation-config vllm --limit-mm-per-prompt.image 2 --tokenizer-mode auto --max-logprobs "
    "20 "
    "--enable-prompt-tokens-details --async-scheduling -O3 --max-model-len 4K --dtype half"
).split()


@pytest.mark.parametrize("command", ["serve", "run"])
def test_the_flags_that_people_have(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = parse(*EVERYDAY, command=command)
    engine, server = build_engine_config(arguments), build_server_config(arguments)
    assert engine.model.model == "demo"
    assert engine.media.limit_mm_per_prompt == {"image": 2}
    assert engine.model.max_model_len == 4096
    assert engine.model.dtype == "float16"
    assert engine.model.generation_config == "vllm"
    assert server.log_level == "warning"
    assert (server.tool_call_parser, server.reasoning_parser) == ("hermes", "qwen3")
    said = capsys.readouterr().err
    for flag in (
        "--enable-auto-tool-choice",
        "--swap-space",
    ):
        assert said.count(flag) == 1
    for flag in (
        "--kv-cache-dtype",
        "--tokenizer-mode",
        "--pipeline-parallel-size",
        "--max-logprobs",
    ):
        assert flag not in said, "vLLM's default passes in silence"


@pytest.mark.parametrize(
    ("command", "argv"),
    [("generate", ["hello"]), ("embed", ["demo", "--text", "a"]), ("chat", ["demo"])],
)
def test_other_commands_read_them_too(
    command: str, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = parse(*argv, "-tp", "1", "--swap-space", "4", "--max_model_len=64", command=command)
    assert build_engine_config(arguments).model.max_model_len == 64
    assert "--swap-space has no effect" in capsys.readouterr().err
    message = refusal(capsys, command, *argv, "--kv_cache_dtype", "fp8")
    assert "kv_cache_dtype 'fp8' is not supported: " in message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["-pp", "2"],
            ["--pipeline-parallel-size 2 is not supported", "--tensor-parallel-size divides"],
        ),
        (["--enable-lora-bias"], ["--enable-lora-bias is not supported", "merge the adapter"]),
        (["--speculative-config", '{"method": "eagle"}'], ["'eagle' is not supported", "ngram"]),
        (["--max-logprobs", "-1"], ["--max-logprobs -1", "20"]),
        (["--load-format", "pt"], ["--load-format", "'pt'", "safetensors"]),
        (["--task", "classify"], ["'classify'", "generate or embed"]),
        (["-port", "3"], ["unknown flag -port", "'--port'"]),
        (["-xyz", "3"], ["unknown flag -xyz.\n"]),
        (["--config", "/no/such.yaml"], ["/no/such.yaml", "cannot be read"]),
    ],
)
def test_refusals_say_why(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, "serve", "demo", *argv)
    assert message.startswith("error: ")
    assert all(word in message for word in words), message


def test_more_devices_are_refused_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a", "-dp", "2"]) == 2
    message = capsys.readouterr().err
    assert "--data-parallel-size is 2, but this is one engine" in message
    assert "--dtype" not in message


def test_a_token_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert "hf_secret" not in refusal(capsys, "serve", "demo", "--hf-token", "hf_secret")
    parse("demo", "--hf-token")


@pytest.mark.parametrize(("short", "long"), SHORT.items())
def test_short_flags_stand_for_flags_that_are_known(short: str, long: str) -> None:
    server = [field.name for field in dataclasses.fields(ServerConfig)]
    known = {flag_of(name) for name in (*RULES, *engine_option_names(), *server)}
    assert long in known, short


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--disable-prefix-caching"], "enable_prefix_caching", False),
        (["--no-enable-chunked-prefill"], "enable_chunked_prefill", False),
        (["--enable-log-stats"], "disable_log_stats", False),
        (["--media-io-kwargs.video.num_frames=40"], "media_io_kwargs", {"video": {"num_frames": 40}}),
        (["--limit_mm_per_prompt.image", "2", "--limit-mm-per-prompt.video.count", "1"],
         "limit_mm_per_prompt", {"image": 2, "video": {"count": 1}}),
        (["--limit-mm-per-prompt", '{"image": 2, "audio": 1}', "--limit-mm-per-prompt.image", "3"],
         "limit_mm_per_prompt", {"image": 3, "audio": 1}),
        (["--limit-mm-per-prompt.image=3", '--limit-mm-per-prompt={"video": 2}'],
         "limit_mm_per_prompt", {"image": 3, "video": 2}),
        (["--hf-overrides.architectures+", "A,B"], "hf_overrides", {"architectures": ["A", "B"]}),
        (["--hf-overrides.name", "x.y"], "hf_overrides", {"name": "x.y"}),
        (["--rope-theta", "1e6", "--hf-overrides.a", "1"], "hf_overrides", {"rope_theta": 1e6, "a": 1}),
        (["--chat-template", "./a_b.jinja"], "chat_template", "./a_b.jinja"),
        (["--max-num-batched-tokens", "1.5k"], "max_num_batched_tokens", 1500),
        (["--kv-cache-memory-bytes=2G"], "kv_cache_memory_bytes", 2 << 30),
        (["--max-model-len", "auto"], "max_model_len", None),
        (["--max-model-len", "-1"], "max_model_len", None),
        (["--language-model-only"], "limit_mm_per_prompt", {"image": 0, "video": 0, "audio": 0}),
        (["--num-gpu-blocks-override", "7"], "num_kv_blocks", 7),
        (["--num-gpu-blocks-override", "7", "--num-kv-blocks", "8"], "num_kv_blocks", 8),
        (["--load-format", "runai_streamer"], "load_format", "safetensors"),
        (["--kv-cache-dtype", "int8_per_token_head"], "kv_cache_dtype", "int8"),
        (["--disable-uvicorn-access-log"], "disable_access_log", True),
        (["--uvicorn-log-level", "trace"], "log_level", "debug"),
        (["--served-model-name", "a.b", "c"], "served_model_name", ("a.b", "c")),
    ],
)  # fmt: skip
def test_spellings(argv: list[str], name: str, value: Any) -> None:
    arguments = parse("demo", *argv)
    assert getattr(arguments, name) == value
    build_engine_config(arguments)


FILE = """
model: from-the-file
port: 12345
enforce-eager: true
enable_prefix_caching: false
async-scheduling: true
allowed-origins: [a, b]
swap-space:
limit-mm-per-prompt:
  image: 3
served-model-name: [x]
"""


def test_a_file_of_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(FILE)
    arguments = parse("--config", str(file))
    assert arguments.model == "from-the-file"
    assert (arguments.port, arguments.enforce_eager) == (12345, True)
    assert arguments.enable_prefix_caching is False
    assert arguments.allowed_origins == ("a", "b")
    assert arguments.limit_mm_per_prompt == {"image": 3}
    assert "--async-scheduling has no effect" in capsys.readouterr().err
    over = parse(
        "demo",
        "--port=1",
        f"--config={file}",
        "--enable-prefix-caching",
        "--served-model-name",
        "y",
    )
    assert (over.model_argument, hasattr(over, "model"), over.port) == (["demo"], False, 1)
    assert over.enable_prefix_caching is True
    assert over.served_model_name == ("y",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n", "must hold flags"),
        ("a: [\n", "cannot be read"),
        ("no-such-flag: 1\n", "no-such-flag"),
    ],
)
def test_files_that_are_none(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    assert words in refusal(capsys, "serve", "demo", "--config", str(file))


def test_keys_in_a_file_that_cannot_be_read_are_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 1\napi-key: [sk-secret, b\nhost: x\n")
    message = refusal(capsys, "serve", "demo", "--config", str(file))
    assert "line 3" in message
    assert "secret" not in message


def test_keywords_of_llm() -> None:
    with pytest.warns(UserWarning, match=r"swap_space has no effect") as caught:
        config = engine_config(
            model=Path("demo"), swap_space=4, tokenizer_mode="auto", enable_lora=False, rope_theta=5e5,
            max_seq_len_to_capture=None, limit_mm_per_prompt=None, max_num_seqs=None, dtype="float",
            pipeline_parallel_size=1, hf_overrides={"a": 1}, num_gpu_blocks_override=9,
        )  # fmt: skip
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert config.model.model == "demo"
    assert config.model.dtype == "float32"
    assert config.model.hf_overrides == {"rope_theta": 5e5, "a": 1}
    assert config.cache.num_kv_blocks == 9
    assert config.scheduler.max_num_seqs == engine_config().scheduler.max_num_seqs


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"enable_lora_bias": True}, "enable_lora_bias is not supported: no such form"),
        ({"speculative_config": {"model": "x"}}, "'x' is not supported: spec"),
        ({"speculative_config": "ngram"}, "an invalid value: ngram"),
        ({"speculative": "eagle"}, "must be one of ngram"),
        ({"prompt_lookup_min": 9, "prompt_lookup_max": 4}, "prompt_lookup_min must be at most"),
        ({"cpu_offload_gb": 4}, "cpu_offload_gb 4"),
        ({"mm_encoder_tp_mode": "both"}, "mm_encoder_tp_mode must be weights or data, got 'both'"),
        ({"convert": "classify"}, "'classify' is not supported"),
        ({"uvicorn_log_level": "info"}, "Unknown keyword .* an option of the server"),
        ({"port": 8000}, "Unknown keyword 'port'. It is an option of the server"),
    ],
)
def test_keywords_that_cannot_be_had(keywords: dict[str, Any], words: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError, match=words):
            engine_config(**keywords)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 5}},
            ("ngram", 5, 3, 16),
        ),
        (
            {
                "speculative_config": {
                    "model": "[ngram]",
                    "num_speculative_tokens": 90,
                    "prompt_lookup_max": 2,
                }
            },
            ("ngram", 16, 2, 2),
        ),
        (
            {"speculative_config": {"method": "suffix", "prompt_lookup_min": 4}},
            ("ngram", 8, 4, 16),
        ),
        (
            {
                "speculative_model": "[ngram]",
                "num_speculative_tokens": 4,
                "ngram_prompt_lookup_max": 7,
                "ngram_prompt_lookup_min": 1,
            },
            ("ngram", 4, 1, 7),
        ),
        ({"spec_method": "ngram", "spec_tokens": "6"}, ("ngram", 6, 3, 16)),
        ({"speculative_config": {}}, (None, 8, 3, 16)),
    ],
)
def test_speculation_by_ngrams(given: dict[str, Any], wanted: tuple[Any, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = engine_config(**given).speculation
    assert dataclasses.astuple(found) == wanted


@pytest.mark.parametrize(("mode", "ranks"), [("weights", "first"), ("data", "all")])
def test_ranks_that_encode(mode: str, ranks: str) -> None:
    assert engine_config(mm_encoder_tp_mode=mode).parallel.encoder_ranks == ranks


def test_vllms_defaults_are_never_refused() -> None:
    refused = {n: r.default for n, r in ENGINE_RULES.items() if r.effect is Effect.REFUSED}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engine_config(**refused) == engine_config()
        assert engine_config(**dict.fromkeys(ENGINE_RULES)) == engine_config()


def test_the_page_is_up_to_date() -> None:
    page = ROOT / "docs" / "from_vllm.md"
    assert page.read_text(encoding="utf-8") == from_vllm_markdown(), "run scripts/from_vllm_docs"
    for name in RULES:
        assert f"`{flag_of(name)}`" in from_vllm_markdown()
    checked = subprocess.run([sys.executable, ROOT / "scripts" / "from_vllm_docs", "--check"])
    assert checked.returncode == 0
