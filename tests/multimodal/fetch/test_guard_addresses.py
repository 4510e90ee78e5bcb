import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensorium.multimodal.fetch.guard import is_public, literal_address

NOT_PUBLIC = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "10.255.255.255",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.7",
    "203.0.113.9",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::ffff:127.0.0.1",
    "::ffff:8.8.8.8",
    "::8.8.8.8",
    "::127.0.0.1",
    "64:ff9b::808:808",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:0:53aa:64c:1::1",
    "2001:10::1",
    "2001:20::1",
    "2001:db8::1",
    "2002:7f00:1::1",
    "2002:808:808::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
    "2606:4700::5efe:7f00:1",
    "2606:4700::200:5efe:7f00:1",
    "2606:4700::1%1",
]

PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "9.255.255.255",
    "11.0.0.1",
    "100.63.255.255",
    "100.128.0.1",
    "126.255.255.255",
    "128.0.0.1",
    "169.253.255.255",
    "169.255.0.1",
    "172.15.255.255",
    "172.32.0.1",
    "192.167.255.255",
    "192.169.0.1",
    "198.17.255.255",
    "198.20.0.1",
    "223.255.255.255",
    "2606:4700::1111",
    "2a00:1450:4001::200e",
    "2001:4860:4860::8888",
    "3ffe::1",
]


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_special_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_ordinary_addresses_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("text", ["", "localhost", "127.1", "0x7f000001", "1.2.3.4.5", "[::1]"])
def test_what_is_no_address_is_not_public(text: str) -> None:
    assert not is_public(text)


@given(st.ip_addresses())
def test_whatever_python_calls_special_is_not_public(address) -> None:
    special = (
        not address.is_global
        or address.is_multicast
        or address.is_private
        or address.is_reserved
        or address.is_link_local
        or address.is_loopback
    )
    if special:
        assert not is_public(str(address))


@given(st.ip_addresses(v=4))
def test_no_ipv6_form_of_an_ipv4_address_is_public(address) -> None:
    number = int(address)
    forms = (
        number,
        (0xFFFF << 32) | number,
        (0x64FF9B << 96) | number,
        (0x2002 << 112) | (number << 80) | 1,
        (0x20010000 << 96) | (number ^ 0xFFFFFFFF),
        (0x26064700 << 96) | (0x5EFE << 32) | number,
    )
    for form in forms:
        assert not is_public(str(ipaddress.IPv6Address(form)))


@given(st.ip_addresses(v=4))
def test_only_the_dotted_spelling_of_an_ipv4_address_is_read(address) -> None:
    number = int(address)
    first, rest = number >> 24, number & 0xFFFFFF
    assert literal_address(str(address)) == str(address)
    for spelling in (
        str(number),
        hex(number),
        oct(number).replace("o", ""),
        f"{first}.{rest}",
        f"{hex(first)}.{rest}",
        f"0{first:o}.{hex(rest)}",
        f"{address}.",
        f"0{address}",
    ):
        with pytest.raises(ValueError):
            literal_address(spelling)


@pytest.mark.parametrize(
    "host", ["example.com", "a-b.example", "face", "1und1.de", "3com", "0xcafe.org"]
)
def test_names_are_no_literals(host: str) -> None:
    assert literal_address(host) is None
