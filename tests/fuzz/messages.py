"""What no message to a client may hold."""

from __future__ import annotations

import re

_PATTERNS = {
    "an address of memory": r"0x[0-9a-fA-F]{3,}",
    "a path": r"(?<![\w.:/])/(?:home|root|usr|opt|tmp|var|proc|etc|dev|sys|mnt|srv|lib|work)\b[/\w.-]*",
    "a source file": r"\b\w+\.(?:py|so|c|cpp|h|rs)\b(?!\w)",
    "an object of Python": r"<[\w.]+ (?:object|instance) at|<class '|<function |<module ",
    "a library's own words": (
        r"Errno|Traceback|errno|avcodec|libav|swscale|Invalid data found|\bPIL\.|_io\.|BytesIO|"
        r"numpy\.|torch\._|zlib|broken data "
        r"stream|SyntaxError|IndexError|KeyError|TypeError|OverflowError|"
        r"RuntimeError|site-packages|soundfile\.|sndfile"
    ),
    "an inner address": r"\b(?:127\.0\.0\.1|localhost|169\.254\.\d+\.\d+)\b",
}
_COMPILED = {what: re.compile(pattern) for what, pattern in _PATTERNS.items()}


def leak_in(message: str, sent: str = "") -> str:
    """What a message gives away that the client had not ``sent`` itself.

    Empty when it gives nothing away.
    """
    for what, pattern in _COMPILED.items():
        for found in pattern.finditer(message):
            if found[0] not in sent:
                return f"{what}: {found[0][:80]!r}"
    return ""
