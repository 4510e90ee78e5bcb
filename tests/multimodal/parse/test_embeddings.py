import base64
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors

from sensorium.errors import InvalidEmbeddingsError, MediaTooLargeError, RequestError
from sensorium.multimodal.parse.embeddings import decode_embeddings

LIMIT = 1 << 20


def saved(value: object, **options) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def read(data: bytes) -> Any:
    return decode_embeddings(base64.b64encode(data).decode(), max_bytes=LIMIT)


def repacked(data: bytes, compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    """The archive with some members replaced (double underscores in names stand for slashes)."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            short = name.partition("/")[2].replace("/", "__").replace(".", "_")
            new.writestr(name, members.get(short, old.read(name)))
    return out.getvalue()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32]
)
def test_what_was_saved_is_read(dtype: torch.dtype) -> None:
    whole = (torch.randn(4, 3, 5) * 10).to(dtype)
    for tensor in (whole, whole.transpose(0, 2), whole[1:3, :, ::2], whole[2]):
        for data in (saved(tensor), save_safetensors({"x": tensor.contiguous()})):
            found = read(data)
            assert torch.equal(found, tensor)
            assert found.is_contiguous()
            assert found.dtype == dtype


def test_mappings() -> None:
    embeds, grid = torch.randn(4, 8), torch.tensor([[1, 2, 2]])
    both = {"image_embeds": embeds, "image_grid_thw": grid}
    for found in (
        read(saved(both)),
        read(save_safetensors(both)),
        decode_embeddings(both, max_bytes=LIMIT),
        decode_embeddings(
            {name: base64.b64encode(saved(t)).decode() for name, t in both.items()}, max_bytes=LIMIT
        ),
    ):
        assert torch.equal(found["image_embeds"], embeds)
        assert torch.equal(found["image_grid_thw"], grid)


@pytest.mark.parametrize("sizes", [[(20, 30), (9, 9)], [[20, 30]], (20, 30), 4])
def test_sizes_beside_embeddings_may_be_plain_numbers(sizes: object) -> None:
    found = decode_embeddings({"image_embeds": torch.zeros(2, 3), "sizes": sizes}, max_bytes=LIMIT)
    assert found["sizes"] == sizes
    for wrong in ([True], [[[4]]], None):
        with pytest.raises(InvalidEmbeddingsError):
            decode_embeddings({"sizes": [wrong]}, max_bytes=LIMIT)


def test_tensors_pass_and_lose_their_gradient() -> None:
    tensor = torch.zeros(2, 3, requires_grad=True)
    found = decode_embeddings(tensor, max_bytes=LIMIT)
    assert not found.requires_grad
    assert torch.equal(found, tensor)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_only_dense_real_tensors() -> None:
    quantized = torch.quantize_per_tensor(torch.zeros(4), 1.0, 0, torch.qint8)
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    for tensor in (
        torch.eye(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, device="meta"),
        quantized,
        nested,
    ):
        with pytest.raises(InvalidEmbeddingsError):
            decode_embeddings(tensor, max_bytes=LIMIT)
    for tensor in (torch.eye(3).to_sparse(), torch.zeros(2, dtype=torch.complex64), quantized):
        with pytest.raises(InvalidEmbeddingsError):
            read(saved(tensor))
    for other in (None, 3, [1.0], object()):
        with pytest.raises(InvalidEmbeddingsError):
            decode_embeddings(other, max_bytes=LIMIT)


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_is_executed(tmp_path) -> None:
    target = tmp_path / "made"
    evil = Evil(str(target))
    for data in (
        saved(evil),
        saved({"x": evil}),
        saved([torch.zeros(1), evil]),
        saved(evil, _use_new_zipfile_serialization=False),
        pickle.dumps(evil),
        repacked(saved(torch.zeros(2)), data_pkl=pickle.dumps(evil, protocol=2)),
        repacked(saved(torch.zeros(2)), data_pkl=pickle.dumps(evil, protocol=5)),
    ):
        with pytest.raises(InvalidEmbeddingsError):
            read(data)
        assert not target.exists()
    pickle.loads(pickle.dumps(evil))
    assert target.exists()  # it would have worked


def test_other_contents_are_refused() -> None:
    for value in (
        "x",
        3,
        None,
        [torch.zeros(1)],
        {},
        {"a": 1},
        (torch.zeros(1),),
        torch.nn.Linear(1, 1),
    ):
        with pytest.raises(InvalidEmbeddingsError):
            read(saved(value))
    for data in (b"", b"x", b"PK\x03\x04", b"PK\x03\x04" + bytes(50), bytes(8) + b"{", bytes(100)):
        with pytest.raises(InvalidEmbeddingsError):
            read(data)
    with pytest.raises(InvalidEmbeddingsError):
        read(save_safetensors({}))


def test_files_larger_in_memory_than_on_the_wire_are_refused() -> None:
    with pytest.raises(InvalidEmbeddingsError, match="larger than the file"):
        read(saved(torch.zeros(1).expand(1_000_000)))
    tensor = torch.zeros(1000)
    with pytest.raises(InvalidEmbeddingsError):
        read(saved({str(i): tensor for i in range(100)}))
    with pytest.raises(InvalidEmbeddingsError, match="compressed"):
        read(repacked(saved(torch.zeros(100_000)), zipfile.ZIP_DEFLATED))
    with pytest.raises(MediaTooLargeError):
        read(saved(torch.zeros(LIMIT)))


def test_storages_are_checked_against_their_description() -> None:
    data = saved(torch.arange(6.0).reshape(2, 3))
    assert torch.equal(read(repacked(data)), torch.arange(6.0).reshape(2, 3))
    with pytest.raises(InvalidEmbeddingsError, match="size"):
        read(repacked(data, data__0=bytes(20)))
    with pytest.raises(InvalidEmbeddingsError, match="little-endian"):
        read(repacked(data, byteorder=b"big"))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        program = archive.read(name)
    shape = b"K\x02K\x03\x86"
    assert program.count(shape) == 1
    for bad in (
        b"K\x02K\x04\x86",
        b"K\x03K\x03\x86",
        b"K\x00K\x03\x86",
        b"J\xff\xff\xff\xffK\x03\x86",
    ):
        with pytest.raises(InvalidEmbeddingsError):
            read(repacked(data, data_pkl=program.replace(shape, bad)))
    strides = b"K\x03K\x01\x86"
    assert program.count(strides) == 1
    with pytest.raises(InvalidEmbeddingsError, match="does not fit its storage"):
        read(repacked(data, data_pkl=program.replace(strides, b"K\x04K\x01\x86")))
    for bad in (b"J\xfd\xff\xff\xffK\x01\x86", b"K\x03K\x01K\x01\x87"):
        with pytest.raises(InvalidEmbeddingsError):
            read(repacked(data, data_pkl=program.replace(strides, bad)))


DEEP = b")" + b"".join(b"\x94" + b"h" + bytes([i]) + b"\x86" for i in range(64))
"""A tuple that holds one twice, which holds one twice, …: 64 levels, 2**64 leaves."""


@pytest.mark.parametrize(
    "program",
    [
        b"}" + DEEP + b"K\x01s",  # a key
        b"}(" + DEEP + b"K\x01u",
        DEEP + b"\x8c\x01x\x93",  # a module, a class
        b"\x8c\x05torch" + DEEP + b"\x93",
        b"\x8c\x01x" + DEEP + b"\x93)R",
        DEEP + b")R",  # a function, arguments
        b"ccollections\nOrderedDict\n" + DEEP + b"R",
        b"ctorch._utils\n_rebuild_tensor_v2\n" + DEEP + b"R",
        DEEP + b"Q",  # a storage, and each of its fields
        b"(" + DEEP + b"ctorch\nFloatStorage\n\x8c\x010\x8c\x03cpuK\x02tQ",
        b"(\x8c\x07storage" + DEEP + b"\x8c\x010\x8c\x03cpuK\x02tQ",
        b"(\x8c\x07storage\x8c\x05torch" + DEEP + b"\x93\x8c\x010\x8c\x03cpuK\x02tQ",
        b"(\x8c\x07storagectorch\nFloatStorage\n" + DEEP + b"\x8c\x03cpuK\x02tQ",
        b"(\x8c\x07storagectorch\nFloatStorage\n\x8c\x010\x8c\x03cpu" + DEEP + b"tQ",
        b"}\x8c\x01x" + DEEP + b"s",  # a value
        DEEP,
    ],
)
def test_deep_values_are_not_walked(program: bytes) -> None:
    """In a process of its own: one that walks them holds the interpreter's lock for ever."""
    data = repacked(saved(torch.zeros(2)), data_pkl=b"\x80\x04" + program + b".")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        program = archive.read(name)
    code = (
        "import sys\n"
        "from sensorium.errors import InvalidEmbeddingsError\n"
        "from sensorium.multimodal.parse.embeddings import _check_tensors, _PickleReader\n"
        "try:\n"
        "    found = _PickleReader().read(sys.stdin.buffer.read())\n"
        "    _check_tensors(found if isinstance(found, dict) else {'': found}, 10)\n"
        "except InvalidEmbeddingsError:\n"
        "    print('refused')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=program, capture_output=True, timeout=300, check=False
    )
    assert done.stdout == b"refused\n", done.stderr


def test_names_of_tensors_are_strings() -> None:
    with pytest.raises(InvalidEmbeddingsError):
        read(saved({1: torch.zeros(1)}))
    with pytest.raises(InvalidEmbeddingsError):
        read(saved({None: torch.zeros(1)}))


def test_views_of_one_storage_do_not_keep_it_each() -> None:
    whole = torch.arange(1000.0)
    views = {str(i): whole[i : i + 1] for i in range(16)}
    found = read(saved(views))
    assert list(found) == list(views)
    for name, tensor in found.items():
        assert torch.equal(tensor, views[name])
        assert tensor.untyped_storage().nbytes() == 4


def test_files_of_many_empty_records_are_refused_unread(monkeypatch) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for i in range(1025):
            file.writestr(f"x/{i}", b"")
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(InvalidEmbeddingsError, match="more records"):
        read(archive.getvalue())
    monkeypatch.undo()
    many = {str(i): torch.zeros(0) for i in range(17)}
    with pytest.raises(InvalidEmbeddingsError, match="17 tensors"):
        read(save_safetensors(many))
    header = b"{" + b" " * (1 << 16) + b"}"
    with pytest.raises(InvalidEmbeddingsError, match="header of more"):
        read(struct.pack("<Q", len(header)) + header)


@given(st.binary(max_size=60))
def test_any_pickle_is_read_or_refused(program: bytes) -> None:
    data = repacked(saved(torch.zeros(2)), data_pkl=b"\x80\x02" + program + b".")
    with pytest.raises(InvalidEmbeddingsError):
        read(data)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_damaged_files_never_fail_otherwise(place: int, change: int) -> None:
    for data in (saved(torch.zeros(3, 4)), save_safetensors({"x": torch.zeros(3, 4)})):
        broken = bytearray(data)
        broken[place % len(data)] ^= change
        try:
            found = read(bytes(broken))
        except RequestError:
            continue
        members = found.values() if isinstance(found, dict) else [found]
        assert all(member.numel() <= len(data) for member in members)
