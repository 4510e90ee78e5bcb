import base64
import binascii
import tracemalloc
from unittest.mock import patch
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensorium.errors import MediaRefusedError, MediaTooLargeError, MediaUndecodableError
from sensorium.multimodal.fetch import data_url
from sensorium.multimodal.fetch.data_url import decode_base64, parse_data_url


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


@pytest.mark.parametrize(
    "head",
    ["image/png", "image/png;charset=utf-8", "video/mp4", "audio/ogg", "base64", "application/x"],
)
def test_base64_without_the_word_is_told_before_decoding(head: str) -> None:
    text = base64.b64encode(b"\x89PNG\r\n" * 9).decode()
    with pytest.raises(MediaRefusedError, match="does not say ;base64"):
        parse_data_url(f"data:{head},{text}", 100)


def test_escapes_that_call_themselves_base64_are_told() -> None:
    with pytest.raises(MediaRefusedError, match="percent-encoded; leave ;base64 out"):
        parse_data_url("data:image/png;base64,%89PNG%0D%0A", 100)
    assert parse_data_url("data:image/png,%89PNG%0D%0A", 100) == b"\x89PNG\r\n"


def test_a_data_url_in_a_data_url_is_told() -> None:
    with pytest.raises(MediaRefusedError, match="a second data: URL"):
        parse_data_url("data:image/png;base64,data:image/png;base64,AAAA", 100)


@pytest.mark.parametrize("head", ["image/png; base64", "image/png ;Base64 ", ";base64;charset=x"])
def test_base64_may_stand_anywhere_among_the_parameters(head: str) -> None:
    assert parse_data_url(f"data:{head},AAAA", 100) == bytes(3)


@given(st.text("%41aF\xe9,", max_size=60), st.integers(3, 9))
def test_escapes_across_pieces(text: str, size: int) -> None:
    with patch.object(data_url, "_PIECE", size):
        assert parse_data_url(f"data:,{text}", 300) == unquote_to_bytes(text)


@given(st.binary(max_size=60), st.integers(3, 9))
def test_rewritten_base64_across_pieces(data: bytes, size: int) -> None:
    text = base64.urlsafe_b64encode(data).decode()
    with patch.object(data_url, "_PIECE", size):
        for form in (text, " ".join(text), "".join(f"%{ord(c):x}" for c in text)):
            assert decode_base64(form, 60) == data


def test_escapes_take_no_more_memory_than_they_have_letters() -> None:
    url = "data:," + "%41" * 400_000
    tracemalloc.start()
    try:
        assert parse_data_url(url, 400_000) == b"A" * 400_000
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "form", ["data:,{}", "data:;base64,{}", "data:;base64,{}%41", "data:;base64,AA{}AA"]
)
def test_characters_that_no_encoding_has(form: str) -> None:
    """JSON can spell them."""
    with pytest.raises(MediaUndecodableError):
        parse_data_url(form.format("\ud800"), 100)


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


def test_long_data_in_every_form() -> None:
    data = bytes(range(256)) * 4000
    text = base64.b64encode(data).decode()
    for form in (text, text.rstrip("="), text + "\n", text.replace("+", "-").replace("/", "_")):
        assert parse_data_url(f"data:;base64,{form}", len(data)) == data
        with pytest.raises(MediaTooLargeError):
            parse_data_url(f"data:;base64,{form}", len(data) - 1)
        with pytest.raises(MediaUndecodableError):
            parse_data_url(f"data:;base64,{form[:65_536]}={form[65_536:]}", len(data) + 9)


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
