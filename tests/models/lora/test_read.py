"""Adapters that do not fit, or are made to harm: an error that names the place, no memory."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensorium.engine.adapters import EngineAdapters
from sensorium.errors import ConfigError
from sensorium.kernels.adapters import PackedPart
from sensorium.kernels.cpu.adapters.low_rank import CpuAdapted
from sensorium.models import loader
from sensorium.models.lora import read
from sensorium.models.lora.settings import read_settings
from sensorium.runtime.adapters import FULL, NO_LANE, AdapterSet
from tests.checkpoints import make_llava, make_text
from tests.checkpoints.adapters import make_adapter

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def lanes(base: Path) -> AdapterSet:
    loaded = loader.load(str(base), device="cpu")
    model: Any = loaded.model
    return AdapterSet(model, loaded.family, max_loras=2, max_rank=8, most_bytes=1 << 30)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", base)


def refusal(lanes: AdapterSet, folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        lanes.load(folder)
    assert lanes.lane(b"x" * 32) is None
    return caught.value.message


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Write the tensors anew."""
    tensors = load_file(folder / read.NAME)
    edit(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / read.NAME)


def configure(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"use_dora": True}, "proj' has no tensor lora_magnitude_vector"),
        ({"use_dora": 1}, "use_dora must be true or false"),
        ({"use_new_thing": True}, "use_new_thing is set"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'"),
        ({"r": 0}, "r must be a whole number"),
        ({"r": True}, "r must be a whole number"),
        ({"r": 1 << 40}, "r must be a whole number"),
        ({"r": 5}, r"lora_A\.weight' has the shape \(4, \d+\), not \(5, \d+\)"),
        ({"r": 9}, "has the rank 9, beyond the limit of 8"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern"),
        ({"rank_pattern": {"(a+)+$": 4}}, "is neither a name"),
        ({"alpha_pattern": {".*a.*b.*c.*d": 4}}, "at most 3"),
        ({"rank_pattern": {".*.*": 4}}, "other characters than dots between"),
        ({"rank_pattern": {"a.*..*b": 4}}, "is neither a name"),
        ({"rank_pattern": {r"a\d+\d+": 4}}, "is neither a name"),
        ({"rank_pattern": {str(n): 4 for n in range(257)}}, "at most 256 entries"),
        ({"alpha_pattern": [1]}, "alpha_pattern must be an object"),
        ({"target_modules": [1]}, "target_modules must be"),
        ({"use_rslora": "yes"}, "use_rslora must be"),
    ],
)
def test_settings_that_cannot_be_had(
    lanes: AdapterSet, adapter: Path, values: dict[str, Any], words: str
) -> None:
    configure(adapter, **values)
    assert re.search(words, refusal(lanes, adapter))


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda tensors: tensors.clear(), "has no tensors for layers"),
        (lambda tensors: tensors.pop(f"{Q}.lora_B.weight"), "q_proj' has no tensor lora_B"),
        (rename(f"{Q}.lora_A.weight", f"{Q}.weight"), "q_proj.weight' is no tensor of a LoRA"),
        (put("base_model.model.lm_head.lora_A.weight", torch.ones(4, 64)), "the head"),
        (put("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(4, 9)), "lora_emb"),
        (put("base_model.model.model.layers.7.mlp.up_proj.lora_A.weight", torch.ones(4, 64)),
         "no linear layer that adapters can change"),
        (put("base_model.model.model.norm.lora_A.weight", torch.ones(4, 64)), "model.norm"),
        (put(f"{Q}.lora_magnitude_vector", torch.ones(64)), "magnitude_vector, but use_dora is not"),
        (put(f"{Q}.lora_A.default.weight", torch.ones(4, 64)), "there twice"),
        (put(f"{Q}.lora_A.weight", torch.ones(4, 65)), r"q_proj.lora_A.weight' has the shape"),
        (put(f"{Q}.lora_A.weight", torch.ones(4, 1, 64)), r"q_proj.lora_A.weight' has the shape"),
        (put(f"{Q}.lora_B.weight", torch.ones(4)), r"q_proj.lora_B.weight' has the shape"),
        (put(f"{Q}.lora_A.weight", torch.ones(4, 64, dtype=torch.int8)), "of the type I8"),
        (put(f"{Q}.lora_A.weight", torch.ones(4, 64, dtype=torch.float64)), "of the type F64"),
        (put(f"{Q}.lora_B.weight", torch.full((64, 4), float("nan"))), "q_proj.lora_B.*not finite"),
        (put(f"{Q}.lora_B.weight", torch.full((64, 4), float("inf"))), "q_proj.lora_B.*not finite"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(
    lanes: AdapterSet, adapter: Path, edit: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    change(adapter, edit)
    assert re.search(words, refusal(lanes, adapter))


@pytest.mark.parametrize(
    ("magnitude", "words"),
    [
        (torch.ones(63), r"q_proj.lora_magnitude_vector' has the shape \(63,\), not \(64,\)"),
        (torch.full((64,), float("nan")), "q_proj.lora_magnitude_vector' has numbers that are not"),
        (torch.full((64,), 1e38), "q_proj.lora_magnitude_vector' has numbers that are too large"),
    ],
)
def test_magnitudes_that_do_not_fit(
    lanes: AdapterSet, base: Path, tmp_path: Path, magnitude: torch.Tensor, words: str
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, use_dora=True)
    lanes.unload(lanes.load(adapter).digest)
    change(adapter, put(f"{Q}.lora_magnitude_vector", magnitude))
    assert re.search(words, refusal(lanes, adapter))


def test_files_that_are_none(lanes: AdapterSet, adapter: Path, tmp_path: Path) -> None:
    assert "no adapter_config.json" in refusal(lanes, tmp_path)
    weights, config = adapter / read.NAME, adapter / "adapter_config.json"
    data = weights.read_bytes()
    for damaged in (data[:100], data[: len(data) // 2], b"\xff" * 8 + data[8:], b""):
        weights.write_bytes(damaged)
        assert "not a readable safetensors file" in refusal(lanes, adapter)
    weights.rename(adapter / read.PICKLE)
    assert "a pickle, which is not read" in refusal(lanes, adapter)
    for text in ("[]", "{", "[" * 100_000, '{"a": "' + "x" * (1 << 20) + '"}'):
        config.write_text(text)
        with pytest.raises(ConfigError, match=r"adapter_config\.json of the adapter"):
            read_settings(adapter)
    config.unlink()
    os.mkfifo(config)
    with pytest.raises(ConfigError, match="no regular file"):
        read_settings(adapter)


def test_two_names_of_one_layer(tmp_path: Path) -> None:
    """Names of older and newer layouts lead to the same layer: only one of them may be there."""
    base = make_llava(tmp_path / "base", layout="hub")
    loaded = loader.load(str(base), device="cpu")
    model: Any = loaded.model
    lanes = AdapterSet(model, loaded.family, max_loras=1, max_rank=8, most_bytes=1 << 30)
    adapter = make_adapter(tmp_path / "adapter", base, only=r".*layers\.0\.self_attn\.q_proj")
    old = "base_model.model.language_model.model.layers.0.self_attn.q_proj"
    new = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    change(adapter, lambda tensors: [
        tensors.update({f"{new}.lora_{side}.weight": tensors[f"{old}.lora_{side}.weight"].clone()})
        for side in "AB"
    ])  # fmt: skip
    assert "belong to one layer" in refusal(lanes, adapter)
    change(adapter, lambda tensors: [tensors.pop(name) for name in list(tensors) if old in name])
    assert lanes.load(adapter).in_encoder


def test_places_are_bounded_and_come_back(
    lanes: AdapterSet, base: Path, adapter: Path, tmp_path: Path
) -> None:
    other = make_adapter(tmp_path / "other", base, seed=1, only=".*q_proj")
    third = make_adapter(tmp_path / "third", base, seed=2, only=".*q_proj")
    first = lanes.load(adapter)
    second = lanes.load(other)
    assert lanes.lane(b"") == lanes.encoder_lane(b"") == NO_LANE
    with pytest.raises(KeyError):
        lanes.encoder_lane(b"x" * 32)
    assert {lanes.lane(first.digest), lanes.lane(second.digest)} == {0, 1}
    assert not first.in_encoder
    assert "as many as --max-loras" in refusal(lanes, third)
    assert lanes.load(adapter) == first, "equal content needs no further place"
    lanes.unload(first.digest)
    version = lanes.version
    lanes.unload(first.digest)
    assert lanes.version > version
    assert lanes.lane(first.digest) is None
    found = lanes.load(third)
    assert lanes.lane(found.digest) == first.lane
    for adapter_ in (second, found):
        lanes.unload(adapter_.digest)
    assert lanes.nbytes == 0


def test_a_place_comes_back_when_loading_fails(
    lanes: AdapterSet, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, puts = lanes.version, []
    put = CpuAdapted.set

    def failing(self: CpuAdapted, lane: int, parts: Sequence[PackedPart]) -> None:
        puts.append(lane)
        if len(puts) == 3:
            raise MemoryError
        put(self, lane, parts)

    monkeypatch.setattr(CpuAdapted, "set", failing)
    with pytest.raises(MemoryError):
        lanes.load(adapter)
    assert lanes.nbytes == 0
    assert lanes.version > version
    found = lanes.load(adapter)
    assert found.lane == puts[0]
    lanes.unload(found.digest)


def test_scales_follow_the_patterns(adapter: Path) -> None:
    configure(
        adapter,
        r=4,
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={"mlp.down_proj": 9},
        alpha_pattern={r"^model\.layers\.1\..*": 2, "q_proj": 3},
    )
    found = read_settings(adapter)
    assert found.of("model.layers.0.mlp.down_proj") == (9, 6 / 3)
    assert found.of("model.layers.0.mlp.updown_proj") == (4, 6 / 2)
    assert found.of("model.layers.1.mlp.down_proj") == (9, 2 / 3)
    assert found.of("model.layers.0.self_attn.q_proj") == (4, 3 / 2)
    configure(adapter, use_rslora=False)
    assert read_settings(adapter).of("model.layers.0.self_attn.k_proj") == (4, 6 / 4)


def test_mutated_files_are_refused_or_loaded(lanes: AdapterSet, adapter: Path) -> None:
    """Nothing else happens, whatever bytes of the configuration or of the tensors' header change."""
    draw = random.Random(5)
    files = [adapter / "adapter_config.json", adapter / read.NAME]
    whole = {file: file.read_bytes() for file in files}
    num_refused = 0
    for _ in range(400):
        file = draw.choice(files)
        data = bytearray(whole[file])
        for _ in range(draw.choice((1, 2, 8))):
            place = draw.randrange(min(len(data), 2600))
            data[place] = draw.choice((0, 0x20, 0x22, 0x2D, 0x39, 0x7B, 0xFF, draw.randrange(256)))
        file.write_bytes(bytes(data))
        with contextlib.suppress(ConfigError):
            lanes.unload(lanes.load(adapter).digest)
            num_refused -= 1
        num_refused += 1
        file.write_bytes(whole[file])
    assert 100 < num_refused < 400
    assert lanes.nbytes == 0


def test_bytes_are_bounded_before_memory_is_taken(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loader.load(str(base), device="cpu")
    model: Any = loaded.model
    small = make_adapter(tmp_path / "small", base, only=".*layers.0.*q_proj")
    room = AdapterSet(model, loaded.family, max_loras=4, max_rank=8, most_bytes=1 << 30)
    whole = room.load(adapter).nbytes
    assert whole == room.nbytes > room.load(small).nbytes > 0
    lanes = AdapterSet(model, loaded.family, max_loras=4, max_rank=8, most_bytes=whole)
    monkeypatch.setattr(torch, "empty", None)  # nothing is made
    tight = AdapterSet(model, loaded.family, max_loras=4, max_rank=8, most_bytes=whole - 1)
    assert re.fullmatch(
        r"It takes \d+\.\d MiB, and all adapters together may take \d+\.\d MiB: "
        r"start with a larger --max-lora-memory-gb \(in Python max_lora_memory_gb\)\.",
        refusal(tight, adapter),
    )
    monkeypatch.undo()
    found = lanes.load(adapter)
    assert "beside" in refusal(lanes, small)
    late = room.read(small)
    with pytest.raises(ConfigError, match="beside") as caught:
        lanes.add(late)  # read before another had taken the room
    assert caught.value.param == FULL
    assert (lanes.nbytes, lanes.lane(found.digest)) == (found.nbytes, found.lane)
    assert lanes.lane(late.digest) is None
    lanes.unload(found.digest)
    assert lanes.nbytes == 0
    assert lanes.load(small).nbytes == lanes.nbytes


def test_a_module_that_was_not_trained_is_skipped(lanes: AdapterSet, adapter: Path) -> None:
    """Its B is as it was made, all zeros, as of layers that the model's own code reads past."""
    own = "base_model.model.resampler.attn.out_proj"
    expected = lanes.load(adapter)
    change(adapter, put(f"{own}.lora_A.weight", torch.ones(4, 64)))
    change(adapter, put(f"{own}.lora_B.weight", torch.zeros(64, 4)))
    assert lanes.load(adapter) == expected
    change(adapter, put(f"{own}.lora_B.weight", torch.ones(64, 4)))
    assert "'resampler.attn.out_proj'" in refusal(lanes, adapter)
    for _ in range(2):
        lanes.unload(expected.digest)


def test_a_module_without_a_layer_is_read_within_limits(
    lanes: AdapterSet, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "base_model.model.resampler.attn.out_proj.lora_B.weight"
    change(adapter, put(own, torch.zeros(64, 9)))
    assert "resampler" in refusal(lanes, adapter), "its rank is beyond the largest"
    change(adapter, put(own, torch.zeros(64, 8)))
    lanes.unload(lanes.load(adapter).digest)
    monkeypatch.setattr(read, "MOST_UNTRAINED", 64 * 8 * 4 + 7)
    lanes.unload(lanes.load(adapter).digest)
    change(adapter, put(own.replace("out", "in"), torch.zeros(2, 1)))
    assert "resampler" in refusal(lanes, adapter), "all of them together are bounded"


def header(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The header of the tensors' file, and what is behind it."""
    data = (folder / read.NAME).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def write(folder: Path, entries: object, rest: bytes = b"") -> None:
    data = json.dumps(entries).encode()
    (folder / read.NAME).write_bytes(len(data).to_bytes(8, "little") + data + rest)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F32", "shape": [4, 63]}, "not as many bytes"),
        ({"shape": [4, -64]}, "is damaged"),
        ({"shape": [True, 256]}, "is damaged"),
        ({"shape": [1] * 9}, "is damaged"),
        ({"shape": [10**30]}, "is damaged"),
        ({"shape": None}, "is damaged"),
        ({"dtype": 1}, "is damaged"),
        ({"data_offsets": [0, 1 << 40]}, "is not whole"),
        ({"data_offsets": [1024, 0]}, "is not whole"),
        ({"data_offsets": [0]}, "is damaged"),
    ],
)
def test_entries_that_are_damaged(
    lanes: AdapterSet, adapter: Path, entry: dict[str, Any], words: str
) -> None:
    entries, rest = header(adapter)
    entries[f"{Q}.lora_A.weight"].update(entry)
    write(adapter, entries, rest)
    assert words in refusal(lanes, adapter)


def test_names_and_numbers_of_tensors_are_bounded(lanes: AdapterSet, adapter: Path) -> None:
    """A pattern would be matched with each name while nothing else runs."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    longest = "q.lora_magnitude_vector" + ".a" * 244
    for name, words in ((longest, "no tensor of a LoRA"), (f"{longest}.ab", "more than 512")):
        write(adapter, {name: entry}, bytes(4))
        assert words in refusal(lanes, adapter)
    write(adapter, {str(number): entry for number in range((1 << 14) + 1)}, bytes(4))
    assert "more than 16384 tensors" in refusal(lanes, adapter)
    write(adapter, {"x" * (1 << 23): entry}, bytes(4))
    assert "more than 8 MiB" in refusal(lanes, adapter)
    for suffix in ("", ".default", ".weight", ".default.weight"):
        write(adapter, {f"{Q}.lora_magnitude_vector{suffix}": entry}, bytes(4))
        assert "q_proj' has no tensor lora_A.weight" in refusal(lanes, adapter)


def test_a_file_that_becomes_shorter_while_it_is_read(lanes: AdapterSet, adapter: Path) -> None:
    path = adapter / read.NAME

    def shorten() -> None:
        os.truncate(path, path.stat().st_size // 2)

    with pytest.raises(ConfigError, match="it has become shorter"):
        lanes.read(adapter, shorten)


def test_a_folder_of_the_home_directory(
    lanes: AdapterSet, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(adapter.parent))
    adapters = EngineAdapters(lanes)
    facts = adapters.load("a", "~/adapter")
    assert (facts.path, facts.folder) == ("~/adapter", str(adapter))
    adapters.unload("a")
    with pytest.raises(ConfigError, match=r"Adapter 'b': There is no folder '~/other'\."):
        adapters.load("b", "~/other")
