"""Which IP addresses belong to the public internet.

The tables follow the IANA special-purpose address registries (RFC 6890 and its updates). They are written out so that
the answer does not depend on the Python version. IPv6 forms that carry an IPv4 address (mapped, compatible, NAT64,
6to4, Teredo, ISATAP) are never public, whatever they carry.
"""

from __future__ import annotations

import ipaddress

_SPECIAL_V4 = tuple(
    ipaddress.IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier-grade NAT
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # the platform service of a large cloud, routable in form only
        "169.254.0.0/16",  # link-local
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarking
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)

_GLOBAL_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")

_SPECIAL_V6 = tuple(
    ipaddress.IPv6Network(text)
    for text in (
        "2001::/23",  # protocol assignments: Teredo, benchmarking, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
    )
)

_ISATAP_MARKS = (0x0000_5EFE, 0x0200_5EFE)


def is_public(address: str) -> bool:
    """Whether ``address``, as a resolver writes it, may be connected to. False for anything that is no address."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in _SPECIAL_V4)
    if ip.scope_id is not None or ip not in _GLOBAL_UNICAST_V6:
        return False
    if (int(ip) >> 32) & 0xFFFF_FFFF in _ISATAP_MARKS:
        return False
    return not any(ip in network for network in _SPECIAL_V6)


def literal_address(host: str) -> str | None:
    """The address that a URL's host is, or None when it is a name.

    Raises ValueError for other spellings of an IPv4 address (decimal, octal, hexadecimal, short), which a resolver may
    read as an address: as in the WHATWG URL standard, a host whose last label is a number is an address or invalid.
    """
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    last = host.rstrip(".").rpartition(".")[2]
    if ":" in host or "%" in host or last.isdigit() or _is_hexadecimal(last):
        raise ValueError("not the usual spelling of an address")
    return None


def _is_hexadecimal(label: str) -> bool:
    return label[:2].lower() == "0x" and all(c in "0123456789abcdefABCDEF" for c in label[2:])
