"""Tell a process without memory or threads from a damaged file.

Libraries say both with the errors that they have.
"""

from __future__ import annotations

import errno
import mmap
import threading

from sensorium.errors import OverloadedError
from sensorium.processes import cores

MAX_THREADS = 4
"""Most threads of one decoder. More gain little, and each takes memory."""
NO_THREADS = (
    "There are no threads or no memory left to decode media now; try again later. (On the server: "
    "the limits of the system on processes, and --media-worker-memory-gb.)"
)
_PHRASES = ("out of memory", "malloc failed", "allocate memory", "not enough memory")
"""Messages of Pillow, libavif, soxr and torch, in errors that have no type of their own."""
_SNDFILE_NO_MEMORY = 17


def decoder_threads() -> int:
    """Return the number of threads of a decoder on this machine."""
    return min(MAX_THREADS, cores.find().num_usable)


def check_room(num_bytes: int) -> None:
    """Raise MemoryError unless this process may have so much more memory now.

    None of it is touched.
    """
    try:
        mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        raise MemoryError from None


def check_threads() -> None:
    """Raise OverloadedError unless this process can start a thread now."""
    thread = threading.Thread(target=bool)
    try:
        thread.start()
    except RuntimeError:
        raise OverloadedError(NO_THREADS) from None
    thread.join()


def check_shortage(error: Exception) -> None:
    """Raise MemoryError or OverloadedError for a library's ``error`` that means a shortage.

    MemoryError when it got no memory, OverloadedError when it got no thread.
    """
    number = error.errno if isinstance(error, OSError) else None
    text = str(error).lower()
    if (
        isinstance(error, MemoryError)
        or number == errno.ENOMEM
        or getattr(error, "code", None) == _SNDFILE_NO_MEMORY
        or any(phrase in text for phrase in _PHRASES)
    ):
        raise MemoryError from None
    if "can't start new thread" in text:
        raise OverloadedError(NO_THREADS) from None
