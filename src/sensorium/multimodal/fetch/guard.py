"""Rules for what may be fetched: schemes, hosts, addresses and local paths.

A URL is parsed once, and the client uses the very object that was checked. A host name is resolved
once, all its addresses are checked, and the connection goes to one of them
(``resolver.GuardedResolver``).
"""

from __future__ import annotations

import importlib.resources
import ipaddress
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes

from yarl import URL

from sensorium.config import MediaConfig
from sensorium.errors import ConfigError, MediaRefusedError, MediaTooLargeError

MAX_URL_LENGTH = 8192

PACKAGE_FILES = os.path.realpath(str(importlib.resources.files("sensorium") / "assets" / "files"))
"""Folder of the files of ``sensorium.assets``."""

_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\\\u2028\u2029\ud800-\udfff]")
_AUTHORITY = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)")
_BRACKETS = re.compile(r"\[[^\[\]]*:[^\[\]]*:[^\[\]]*\](:[^\[\]]*)?")
_BAD_PORT = re.compile(r":(?![0-9]{0,5}$)[^:\]]*$")
_HOST = re.compile(r"^[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*$")


@dataclass(frozen=True, slots=True)
class Guard:
    """Rules for URLs and paths.

    Attributes:
        allowed_domains: Hosts as ``normal_host`` writes them. If there are any, only these may be
            fetched, and they may be private.
        local_root: Real path of the folder below which local files may be read, or None.
        allow_redirects: Redirects are followed.
        max_redirects: Maximum number of redirects of one download.
        package_files: The files of ``sensorium.assets`` may be read, too. For callers within the
            process only: it tells where the package is installed.
    """

    allowed_domains: frozenset[str] = frozenset()
    local_root: str | None = None
    allow_redirects: bool = True
    max_redirects: int = 5
    package_files: bool = False

    @classmethod
    def of(cls, config: MediaConfig, *, package_files: bool = False) -> Guard:
        """Make the guard of a configuration. Raises ConfigError for an unusable host or folder."""
        root = config.allowed_local_media_path
        if root and not os.path.isdir(root):
            raise ConfigError(
                f"allowed_local_media_path must be an existing folder, got {root!r}.",
                param="allowed_local_media_path",
            )
        return cls(
            allowed_domains=frozenset(map(_configured_host, config.allowed_media_domains)),
            local_root=os.path.realpath(root) if root else None,
            allow_redirects=config.media_url_allow_redirects,
            max_redirects=config.max_media_redirects,
            package_files=package_files,
        )

    def check_url(self, text: str) -> URL:
        """Parse and check an ``http(s):`` URL; use what is returned. Raises MediaRefusedError."""
        if len(text) > MAX_URL_LENGTH:
            raise MediaRefusedError(
                f"The URL has {len(text)} characters; at most {MAX_URL_LENGTH} are allowed."
            )
        if _FORBIDDEN.search(text) or text != text.strip():
            raise MediaRefusedError(
                "The URL has control characters, backslashes or blanks around it; encode or remove "
                "them."
            )
        authority = _AUTHORITY.match(text)
        if authority is None:
            raise MediaRefusedError("The URL has no host; write it as https://host/path.")
        if "@" in authority[1]:
            raise MediaRefusedError("The URL has credentials (user@host), which are not allowed.")
        bracketed = "[" in authority[1] or "]" in authority[1]
        if "%" in authority[1] or (bracketed and not _BRACKETS.fullmatch(authority[1])):
            raise MediaRefusedError(
                "The host of the URL is neither a name nor an IP address in its usual spelling."
            )
        if _BAD_PORT.search(authority[1]):
            raise MediaRefusedError("The port of the URL is not valid.")
        try:
            url = URL(text)
        except ValueError:
            raise MediaRefusedError("The URL cannot be parsed.") from None
        return self.check_hop(url)

    def check_hop(self, url: URL) -> URL:
        """Check a parsed URL, as of a redirect. Raises MediaRefusedError."""
        if url.scheme not in ("http", "https"):
            raise MediaRefusedError(
                f"Media of scheme {url.scheme[:20]!r} are not fetched; use http, https, data or "
                "file."
            )
        if url.raw_user is not None or url.raw_password is not None:
            raise MediaRefusedError("The URL has credentials (user@host), which are not allowed.")
        full_host = url.raw_host or ""
        host = full_host.removesuffix(".")
        try:
            # aiohttp takes an address with a final dot for a name, and would look it up by itself.
            literal = literal_address(full_host)
        except ValueError:
            raise MediaRefusedError(
                "The host of the URL is an unusual spelling of an IP address; write it in the "
                "usual one."
            ) from None
        if literal is None and not _HOST.match(host):
            raise MediaRefusedError("The host of the URL is not a valid name.")
        if not url.port:
            raise MediaRefusedError("The port of the URL is not valid.")
        if self.allowed_domains:
            if (literal or host) not in self.allowed_domains:
                raise MediaRefusedError(
                    "The host of the URL is not one of those that this server may fetch media from "
                    "(--allowed-media-domains)."
                )
        elif literal is not None and not is_public(literal):
            raise _not_public()
        return url

    def check_addresses(self, host: str, addresses: list[str]) -> None:
        """Check all addresses of a host name. Raises MediaRefusedError unless each is allowed."""
        if normal_host(host) in self.allowed_domains:
            return
        if not addresses or not all(map(is_public, addresses)):
            raise _not_public()

    def is_listed(self, url: URL) -> bool:
        """Return whether the host of a checked URL is an allowed domain, and so may be private."""
        return (
            bool(self.allowed_domains) and normal_host(url.raw_host or "") in self.allowed_domains
        )

    def may_connect(self, address: str) -> bool:
        """Return whether a socket may connect to this address: the last check before it does."""
        try:
            ipaddress.ip_address(address)
        except ValueError:
            return False
        return bool(self.allowed_domains) or is_public(address)

    def read_local(self, text: str, max_bytes: int) -> bytes:
        """Read a ``file:`` URL or a path: a regular file below the allowed folder.

        Symbolic links are resolved before the check. The file is then opened without following any,
        component by component from the folder, so that exchanging one meanwhile has no effect.
        Raises MediaRefusedError or MediaTooLargeError.
        """
        roots = [root for root in (self.local_root, self.package_files and PACKAGE_FILES) if root]
        if not roots:
            raise _no_local_files()
        try:
            real = os.path.realpath(_local_path(text))
        except MediaRefusedError:
            raise
        except (ValueError, OSError):
            raise MediaRefusedError("The path cannot be read as one.") from None
        root = next((r for r in roots if Path(real).is_relative_to(r) and real != r), None)
        if root is None and self.local_root is None:
            raise _no_local_files()
        if root is None:
            raise MediaRefusedError(
                "The file is not below the folder that --allowed-local-media-path allows."
            )
        try:
            descriptor = _open_beneath(root, os.path.relpath(real, root))
        except OSError:
            raise MediaRefusedError(
                "There is no readable regular file of that name below the allowed folder."
            ) from None
        with os.fdopen(descriptor, "rb") as file:
            # At most the size it has now: files of the kernel have none, and are not for requests.
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise MediaTooLargeError(
                    f"The file has {size} bytes; at most {max_bytes} are allowed "
                    "(--max-media-bytes)."
                )
            try:
                return file.read(size)
            except OSError:
                raise MediaRefusedError("The file cannot be read.") from None


def _no_local_files() -> MediaRefusedError:
    return MediaRefusedError(
        "Local files are not allowed; start with --allowed-local-media-path FOLDER to allow those "
        "below it."
    )


def normal_host(text: str) -> str:
    """Return a host in the spelling that is compared: lower case, IDNA, no brackets, no final dot.

    Raises ValueError for text that is no host.
    """
    bare = text.strip().removeprefix("[").removesuffix("]")
    host = URL.build(scheme="http", host=bare).raw_host or ""
    host = host.removesuffix(".")
    literal = literal_address(host)
    if literal is None and not _HOST.match(host):
        raise ValueError("not a host name")
    return literal or host


def _configured_host(text: str) -> str:
    try:
        return normal_host(text)
    except ValueError:
        raise ConfigError(
            "allowed_media_domains must hold host names or addresses without scheme, port or path, "
            f"got {text!r}.",
            param="allowed_media_domains",
        ) from None


def _not_public() -> MediaRefusedError:
    return MediaRefusedError(
        "The host of the URL has an address that is not on the public internet; media are fetched "
        "from public hosts only, or from those of --allowed-media-domains."
    )


def _local_path(text: str) -> str:
    """Return the path of a ``file:`` URL, percent-decoded, or a bare path as it is."""
    if len(text) > MAX_URL_LENGTH:
        raise MediaRefusedError(
            f"The path has {len(text)} characters; at most {MAX_URL_LENGTH} are allowed."
        )
    if text[:5].lower() == "file:":
        rest = text[5:].partition("?")[0].partition("#")[0]
        if rest.startswith("//"):
            host, slash, path = rest[2:].partition("/")
            if host.lower() not in ("", "localhost"):
                raise MediaRefusedError("A file: URL must not name another host.")
            rest = slash + path
        text = os.fsdecode(unquote_to_bytes(rest))
    if "\0" in text or not text:
        raise MediaRefusedError("The path is empty or has a null character.")
    return text


def _open_beneath(root: str, relative: str) -> int:
    """Open a regular file, each component relative to the one above it, without following links.

    Raises OSError if a component is missing or has become a link, or the last is no regular file.
    """
    parts = relative.split(os.sep)
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            below = os.open(
                part,
                os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
                dir_fd=folder,
            )
            os.close(folder)
            folder = below
        if not stat.S_ISREG(os.stat(parts[-1], dir_fd=folder, follow_symlinks=False).st_mode):
            raise FileNotFoundError("not a regular file")
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(parts[-1], flags, dir_fd=folder)
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError("not a regular file")
    return descriptor


# --- addresses ---------------------------------------------------------------------------------

# The tables follow the IANA special-purpose address registries (RFC 6890 and its updates). They
# are written out so that the answer does not depend on the Python version. IPv6 forms that carry an
# IPv4 address (mapped, compatible, NAT64, 6to4, Teredo, ISATAP) are never public.

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
    """Return whether an address is on the public internet; False for text that is no address."""
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
    """Return the address that a URL's host is, or None if it is a name.

    Raises ValueError for other spellings of an IPv4 address (decimal, octal, hexadecimal, short),
    which a resolver may read as an address: as in the WHATWG URL standard, a host whose last label
    is a number is an address or invalid.
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
