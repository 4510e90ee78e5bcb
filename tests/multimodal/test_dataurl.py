import base64
import binascii

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensorium.errors import MediaRefusedError, MediaTooLargeError, MediaUndecodableError
from sensorium.multimodal.dataurl import decode_base64, parse_data_url


@given(st.binary(max_size=300), st.booleans(), st.booleans())
def test_base64_in_every_form(data: bytes, url_safe: bool, padded: bool) -> None:
    text = (base64.urlsafe_b64encode if url_safe else base64.b64encode)(data).decode()
    text = text if padded else text.rstrip("=")
    assert parse_data_url(f"data:image/png;base64,{text}", 300) == data
    assert parse_data_url(f"DATA:image/png;charset=x;BASE64,{text}", 300) == data
    wrapped = "\r\n ".join(text[i : i + 7] for i in range(0, len(text), 7))
    assert decode_base64(wrapped, 300) == data
    assert decode_base64(text.replace("+", "%2B").replace("=", "%3D"), 300) == data


@given(st.binary(max_size=300))
def test_percent_encoding(data: bytes) -> None:
    text = "".join(f"%{byte:02x}" for byte in data)
    assert parse_data_url(f"data:,{text}", 300) == data


@pytest.mark.parametrize("text", ["a", "ab=c", "a*cd", "abcdé", "ab\x00d", "ab==cdef", "abcde"])
def test_damaged_base64(text: str) -> None:
    with pytest.raises(MediaUndecodableError):
        parse_data_url(f"data:;base64,{text}", 100)


@given(st.text("ABCD+/-_=é\0*! ", max_size=12))
def test_only_whole_base64_is_accepted(text: str) -> None:
    """Against the standard library's strict decoder."""
    plain = text.replace(" ", "").replace("-", "+").replace("_", "/").rstrip("=")
    plain += "=" * (-len(plain) % 4)
    try:
        expected = binascii.a2b_base64(plain, strict_mode=True)
    except ValueError:
        expected = None
    try:
        found = decode_base64(text, 100)
    except MediaUndecodableError:
        found = None
    assert found == expected


def test_long_data_are_decoded_in_pieces() -> None:
    data = bytes(range(256)) * 4000
    assert parse_data_url("data:;base64," + base64.b64encode(data).decode(), len(data)) == data


def test_sizes_are_bounded() -> None:
    for size in (9, 10, 11, 12):
        url = "data:;base64," + base64.b64encode(bytes(size)).decode()
        assert parse_data_url(url, size) == bytes(size)
        with pytest.raises(MediaTooLargeError):
            parse_data_url(url, size - 1)
    with pytest.raises(MediaTooLargeError):
        parse_data_url("data:," + "x" * 100, 33)
    with pytest.raises(MediaTooLargeError):
        parse_data_url("data:," + "x" * 100, 99)


def test_a_url_without_a_comma() -> None:
    for url in ("data:", "data:image/png;base64", "data:" + "x" * 5000 + ","):
        with pytest.raises(MediaRefusedError):
            parse_data_url(url, 100)
