import base64
import io
import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors

from sensorium.errors import InvalidEmbeddingsError, MediaTooLargeError, RequestError
from sensorium.multimodal.embeds import decode_embeddings

LIMIT = 1 << 20


def saved(value: object, **options) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def read(data: bytes) -> object:
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
