"""Hostile checkpoints: no code of theirs is executed whatever the flags say, and damaged files
are refused in words.
"""

from __future__ import annotations

import ast
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sensorium
from sensorium import LLM, SamplingParams
from sensorium.errors import ConfigError
from tests import checkpoints
from tests.checkpoints.hf import make_hf, make_hf_text
from tests.parts import build_llm
from tests.reliability.media import picture

pytestmark = pytest.mark.slow

EVIL = """
import pathlib
pathlib.Path({marker!r}).write_text("executed")
class Evil:
    def __init__(self, *args, **kwargs):
        pathlib.Path({marker!r}).write_text("executed")
    from_pretrained = classmethod(lambda cls, *args, **kwargs: cls())
EvilConfig = EvilModel = EvilTokenizer = EvilProcessor = Evil
"""
AUTO_MAP = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModel": "evil.EvilModel",
    "AutoModelForCausalLM": "evil.EvilModel",
    "AutoModelForImageTextToText": "evil.EvilModel",
    "AutoModelForMultimodalLM": "evil.EvilModel",
    "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
    "AutoProcessor": "evil.EvilProcessor",
    "AutoImageProcessor": "evil.EvilProcessor",
    "AutoVideoProcessor": "evil.EvilProcessor",
    "AutoFeatureExtractor": "evil.EvilProcessor",
}
FILES = (
    *("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"),
    *("video_preprocessor_config.json", "generation_config.json"),
)
MAKERS: dict[str, Callable[[Path], Path]] = {
    "text": lambda folder: checkpoints.make_text("llama", folder),
    "qwen2_vl": checkpoints.make_qwen2_vl,
    "phi3_v": checkpoints.make_phi3_v,
    "minicpmv": checkpoints.make_minicpmv,
    "hf_text": lambda folder: make_hf_text("gpt2", folder),
    "hf_gemma3": lambda folder: make_hf("gemma3", folder),
    "hf_internvl": lambda folder: make_hf("internvl", folder),
}


def poison(folder: Path, marker: Path) -> None:
    """Point everything that can name code at a module that leaves a mark when it is imported."""
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    for name in FILES:
        path = folder / name
        old = json.loads(path.read_text()) if path.is_file() else None
        if old is None:
            continue
        added: dict[str, Any] = {
            "auto_map": AUTO_MAP,
            "custom_pipelines": {"x": {"impl": "evil.Evil"}},
        }
        if name == "generation_config.json":
            added = {"custom_generate": "evil.py", "trust_remote_code": True}
        path.write_text(json.dumps({**old, **added, "trust_remote_code": True}))


@pytest.mark.parametrize("maker", MAKERS)
def test_no_code_of_a_checkpoint_is_executed(tmp_path: Path, maker: str) -> None:
    folder, marker = MAKERS[maker](tmp_path / "model"), tmp_path / "marker"
    poison(folder, marker)
    options = {"num_kv_blocks": 60, "block_size": 16, "max_model_len": 512}
    for trusted in (False, True):
        with build_llm(folder, trust_remote_code=trusted, **options) as parts:
            llm, processor = parts.llm, parts.processor
            [output] = llm.generate(
                ["a"], SamplingParams(max_tokens=2, temperature=0), use_tqdm=False
            )
            assert len(output.outputs[0].token_ids) <= 2
            if "image" in processor.modalities and processor.chat_template_available:
                content = [
                    {"type": "image_pil", "image_pil": picture()},
                    {"type": "text", "text": "a"},
                ]
                llm.chat(
                    [{"role": "user", "content": content}],
                    SamplingParams(max_tokens=1),
                    use_tqdm=False,
                )
        assert not marker.exists()


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_no_code_of_a_tokenizer_is_executed(tmp_path: Path, trust_remote_code: bool) -> None:
    """Without a tokenizer.json the tokenizer is converted by a library that can execute code."""
    folder, marker = checkpoints.make_text("llama", tmp_path / "model"), tmp_path / "marker"
    poison(folder, marker)
    (folder / "tokenizer.json").unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "EvilTokenizer"}))
    with pytest.raises(ConfigError, match="tokenizer"):
        LLM(str(folder), trust_remote_code=trust_remote_code)
    assert not marker.exists()


def test_nothing_here_unpickles_or_evaluates() -> None:
    """Neither checkpoints nor clients nor other processes can send what would be executed.

    No module reads such things. Pickles are only taken apart, by ``pickletools``. Rows in
    stages of Ray Data are pickled: Ray does so with all that its processes send to each other, and
    who can send to them can run programs there.
    """
    of_ray = Path(sensorium.__file__).parent / "ray" / "data" / "stages.py"
    modules = {
        "pickle",
        "cPickle",
        "dill",
        "cloudpickle",
        "marshal",
        "shelve",
        "joblib",
        "runpy",
        "code",
    }
    calls = {"eval", "exec", "__import__", "execfile"}
    attributes = {
        ("torch", "load"),
        ("np", "load"),
        ("numpy", "load"),
        ("os", "system"),
        ("yaml", "load"),
    }
    for path in Path(sensorium.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: set[str] = set()
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = {(node.module or "").partition(".")[0]}
            allowed = {"pickle"} if path == of_ray else set()
            assert not (names & modules) - allowed, (path.name, names)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in calls, (path.name, node.lineno)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in attributes, (path.name, node.lineno)


class Bomb:
    """Executes something when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.write_text, (self.marker, "executed")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00001.bin", "model.ckpt"]
)
def test_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    folder, marker = checkpoints.make_text("llama", tmp_path / "model"), tmp_path / "marker"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(ConfigError, match=r"[Ss]afetensors"):
        LLM(str(folder))
    assert not marker.exists()


def with_header(header: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> bytes:
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return json.dumps({"model.embed_tokens.weight": tensor}).encode()


HOSTILE_FILES = {
    "empty": b"",
    "cut in its length": b"\x01\x02",
    "length beyond all": with_header(b"{}", 2**64 - 1),
    "length beyond the file": with_header(b"{}", 10**9),
    "header of a gigabyte": with_header(b"{" + b" " * 1000, 1 << 30),
    "no JSON": with_header(b"not json"),
    "nested deeply": with_header(b"[" * 100_000),
    "a list": with_header(b"[]"),
    "offsets beyond the data": with_header(entry([4], 0, 16)),
    "offsets that overflow": with_header(entry([4], 2**64 - 16, 2**64 - 1), data=bytes(16)),
    "offsets backwards": with_header(entry([4], 16, 0), data=bytes(16)),
    "shape that overflows": with_header(entry([2**32, 2**32, 2**32], 0, 16), data=bytes(16)),
    "shape that is negative": with_header(entry([-4], 0, 16), data=bytes(16)),
    "shape that does not fit": with_header(entry([4096], 0, 16), data=bytes(16)),
    "unknown type": with_header(entry([4], 0, 16, "F33"), data=bytes(16)),
    "pickle": pickle.dumps([1]),
    "GGUF": b"GGUF" + bytes(100),
}


@pytest.mark.parametrize("kind", HOSTILE_FILES)
def test_hostile_weight_files_are_refused(tmp_path: Path, kind: str) -> None:
    folder = checkpoints.make_text("llama", tmp_path)
    (folder / "model.safetensors").write_bytes(HOSTILE_FILES[kind])
    with pytest.raises(ConfigError) as caught:
        LLM(str(folder))
    assert "safetensors" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("target", ["../outside.safetensors", "/etc/passwd", "model-2.bin", "."])
def test_an_index_names_files_beside_it_only(tmp_path: Path, target: str) -> None:
    folder = checkpoints.make_text("llama", tmp_path / "model", sharded=True)
    shard = next(folder.glob("model-*.safetensors"))
    (tmp_path / "outside.safetensors").write_bytes(shard.read_bytes())
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {
        name: target if file == shard.name else file for name, file in index["weight_map"].items()
    }
    path.write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="index"):
        LLM(str(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"a": NaN', "\x00", "null"])
def test_damaged_configurations_are_refused(tmp_path: Path, name: str, text: str) -> None:
    folder = checkpoints.make_text("llama", tmp_path)
    (folder / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        LLM(str(folder))
    assert str(tmp_path) not in str(caught.value)
