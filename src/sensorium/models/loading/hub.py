"""Downloads from the Hugging Face hub, what they would take, and errors that say what to do."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sensorium.errors import ConfigError
from sensorium.forks import OWN_THREADS

RESUMED_BYTES = 16 << 20
"""Size from which on a file that is not complete stays for the next process."""
_AT_ONCE = 8
_THREADS = f"{OWN_THREADS}hub"
_ATTEMPTS = 5
WAIT_SECONDS = 1.0
"""Seconds between two attempts of a download."""
_LOCK_SECONDS = 0.2
CHUNK_BYTES = 1 << 20
"""Bytes of a download that are written at a time."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PARTIAL = 206

logger = logging.getLogger(__name__)


class _StoppedError(Exception):
    """The download was given up; nobody waits for it."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository: its name, its size in bytes, and if it is in the cache already."""

    name: str
    size: int
    is_cached: bool


def download(
    model: str,
    revision: str | None,
    wanted: Sequence[str],
    ignored: Sequence[str] = (),
    *,
    download_dir: str | None,
) -> Path:
    """Download the files of a repository that match ``wanted`` and not ``ignored``.

    Files that are in the cache stay. A connection that breaks off is resumed, and so is a large
    file that another process did not complete. Returns their folder. Raises ConfigError with
    advice.
    """
    from huggingface_hub import snapshot_download

    selected: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": list(wanted),
        "ignore_patterns": list(ignored),
        "cache_dir": download_dir,
    }
    with _errors_explained(model, revision):
        if not _is_here(model, selected):
            _fetch_large(model, selected, cache_folder(download_dir))
        return Path(snapshot_download(model, **selected, tqdm_class=_bars()))


def files(model: str, revision: str | None, *, download_dir: str | None) -> list[HubFile]:
    """Return all files of a repository. Downloads nothing. Raises ConfigError with advice."""
    from huggingface_hub import snapshot_download

    with _errors_explained(model, revision):
        found = snapshot_download(
            model, revision=revision, cache_dir=download_dir, dry_run=True, tqdm_class=_bars()
        )
    return [HubFile(file.filename, file.file_size or 0, file.is_cached) for file in found]


def beginning(model: str, file: str, revision: str | None, num_bytes: int) -> bytes:
    """Return the first bytes of a file of a repository. Raises ConfigError with advice."""
    return piece(model, file, revision, 0, num_bytes)


def piece(model: str, file: str, revision: str | None, start: int, num_bytes: int) -> bytes:
    """Return bytes of a file of a repository, from ``start`` on; fewer where it ends.

    Raises ConfigError with advice.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    found = bytearray()
    with _errors_explained(model, revision):
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        headers["Range"] = f"bytes={start}-{start + num_bytes - 1}"
        url = hf_hub_url(model, file, revision=revision)
        with get_session().stream("GET", url, headers=headers, follow_redirects=True) as answer:
            hf_raise_for_status(answer)
            is_part = answer.status_code == _PARTIAL and _begins_at(start, answer.headers)
            if start and not is_part:
                raise ConfigError(
                    f"Model {model!r}: the hub does not send a part of {file!r}, which a "
                    "description takes. Download the file, and name it.",
                    param="model",
                )
            for data in answer.iter_bytes():
                found += data
                if len(found) >= num_bytes:  # a server may ignore the range
                    break
    return bytes(found[:num_bytes])


def _is_here(model: str, selected: dict[str, Any]) -> bool:
    """Return true where all files are in the cache, as far as that knows. Asks nobody."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(model, **selected, local_files_only=True)
    except OSError:
        return False
    return True


def _fetch_large(model: str, selected: dict[str, Any], cache: Path) -> None:
    """Download large files into the hub's cache, each from where an earlier process stopped.

    The hub's client gives each process a file of its own, and begins again. It links what is
    complete here, and takes what is not known by a SHA-256.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    from sensorium import progress

    hidden: Any = progress.HiddenBar
    try:
        found: Any = snapshot_download(model, **selected, dry_run=True, tqdm_class=hidden)
    except DryRunError:  # the hub cannot be reached; the caller says what that means
        return
    large = [f for f in found if f.will_download and (f.file_size or 0) >= RESUMED_BYTES]
    if not large:
        return
    blobs = cache / f"models--{model.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    total = sum(file.file_size for file in large)
    stop = threading.Event()
    pool = ThreadPoolExecutor(_AT_ONCE, _THREADS)
    with progress.bar("Downloading", total, unit="B") as bar:
        try:
            tasks = [
                pool.submit(_fetch, model, file.filename, file.commit_hash, blobs, bar, stop)
                for file in large
            ]
            for task in as_completed(tasks):
                task.result()
        finally:
            # The threads see it at their next chunk. Python waits for them when it exits.
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _fetch(
    model: str, name: str, commit: str, blobs: Path, bar: Any, stop: threading.Event
) -> None:
    """Download one file to where the hub's cache has it. Raises what its client raises."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(model, name, revision=commit, endpoint=constants.ENDPOINT)
    facts = get_hf_file_metadata(url)
    digest, size = facts.etag or "", facts.size
    if size is None or not _SHA256.fullmatch(digest):
        return
    blob, partial = blobs / digest, blobs / f"{digest}.resumed.incomplete"
    with partial.open("a+b") as file:
        _lock(file, stop)  # another process may write it
        if blob.exists():
            partial.unlink(missing_ok=True)
            return
        _append(url, file, size, bar, stop)
        if _digest(file, stop) == digest:
            os.fsync(file.fileno())
            partial.replace(blob)
        else:
            partial.unlink(missing_ok=True)
            logger.warning("%s of %s did not arrive as it is; it is downloaded again", name, model)


def _lock(file: IO[bytes], stop: threading.Event) -> None:
    """Wait for a file that another process may hold. Raises _StoppedError."""
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if stop.wait(_LOCK_SECONDS):
            raise _StoppedError


def _append(url: str, file: IO[bytes], size: int, bar: Any, stop: threading.Event) -> None:
    """Download what a file lacks of its ``size`` bytes.

    Raises what the hub's client raises, or ConfigError, when several attempts in a row bring
    nothing; _StoppedError.
    """
    if file.seek(0, os.SEEK_END) > size:
        file.truncate(0)
    bar.update(file.seek(0, os.SEEK_END))
    attempts_left = _ATTEMPTS
    while (start := file.seek(0, os.SEEK_END)) < size:
        broken: Exception | None = None
        try:
            _receive(url, file, start, bar, stop)
        except _broken_connections() as error:
            broken = error
        gained = file.seek(0, os.SEEK_END) > start
        attempts_left = _ATTEMPTS if gained else attempts_left - 1
        if not attempts_left:
            raise broken or ConfigError(
                f"The hub sends no more than {start} of the {size} bytes of a file. Repeat the "
                "command.",
                param="model",
            )
        if broken is not None:
            logger.warning("a download broke off and is resumed: %s", broken)
        if (broken is not None or not gained) and stop.wait(WAIT_SECONDS):
            raise _StoppedError


def _receive(url: str, file: IO[bytes], start: int, bar: Any, stop: threading.Event) -> None:
    """Append to a file of ``start`` bytes what the hub sends from there on.

    The file is empty afterwards when the hub sends another part. Raises _StoppedError.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        hf_raise_for_status(response)
        is_part = response.status_code == _PARTIAL
        if start and not (is_part and _begins_at(start, response.headers)):
            file.truncate(0)
            bar.update(-start)
            if is_part:
                return
        for chunk in response.iter_bytes(CHUNK_BYTES):
            if stop.is_set():
                raise _StoppedError
            file.write(chunk)
            bar.update(len(chunk))
        file.flush()


def _begins_at(start: int, headers: Mapping[str, str]) -> bool:
    """Return whether a part of a file begins at a byte, as its header says."""
    return re.match(rf"bytes {start}-", headers.get("Content-Range", "").strip()) is not None


def _digest(file: IO[bytes], stop: threading.Event) -> str:
    """Return the SHA-256 of a file. Raises _StoppedError."""
    file.flush()
    file.seek(0)
    found = hashlib.sha256()
    while data := file.read(CHUNK_BYTES):
        if stop.is_set():
            raise _StoppedError
        found.update(data)
    return found.hexdigest()


def cache_folder(download_dir: str | None) -> Path:
    """Return the folder that downloads go to; it need not exist."""
    if download_dir:
        return Path(download_dir).expanduser()
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _bars() -> type[Any]:
    """Return the bars of a download: that of the bytes alone is shown."""
    from sensorium import progress

    kind = progress.bar_class()

    class Bytes(kind):  # type: ignore[valid-type, misc]
        """The bar of the bytes that are written; the hub opens others beside it."""

        def __init__(self, *args: Any, **keywords: Any) -> None:
            if keywords.get("unit") != "B" or keywords.get("desc") == "Downloading bytes":
                keywords["disable"] = True
            keywords.pop("bar_format", None)
            super().__init__(*args, **{**keywords, "desc": "Downloading"})

        def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
            """Keep the description."""

    return Bytes


@contextlib.contextmanager
def _errors_explained(model: str, revision: str | None) -> Iterator[None]:
    """Turn errors of the hub's client into ConfigError with what to do."""
    from huggingface_hub import errors as hub

    where = f"{model!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        yield
    except hub.HFValidationError as error:
        reason = "it is neither a folder here nor a well-formed Hugging Face id"
        raise ConfigError(f"Model {where}: {reason}.", param="model") from error
    except hub.GatedRepoError as error:
        reason = (
            "its owner asks for agreement first: accept the terms on its page on the Hugging Face "
            "hub, then log in with `hf auth login` or set HF_TOKEN"
        )
        raise ConfigError(f"Model {where}: {reason}.", param="model") from error
    except hub.RevisionNotFoundError as error:
        raise ConfigError(
            f"Model {where}: the hub has no such revision.", param="revision"
        ) from error
    except hub.RepositoryNotFoundError as error:
        reason = (
            "there is no folder of that name here, and the Hugging Face hub has no such model (or "
            "it is private: log in with `hf auth login` or set HF_TOKEN)"
        )
        raise ConfigError(f"Model {where}: {reason}.", param="model") from error
    except _broken_connections() as error:
        reason = (
            f"the connection to the hub broke off, several times ({type(error).__name__}). Files "
            "that are complete stay: repeat the command for the others"
        )
        raise ConfigError(f"Model {where}: {reason}.", param="model") from error
    except OSError as error:
        # Also the hub's errors of connection, of status, and of offline mode.
        reason = (
            "there is no folder of that name here, it is not in the local cache of the Hugging "
            "Face hub, and the hub cannot be reached. Check the network (and that HF_HUB_OFFLINE "
            "is unset), or give a local folder"
        )
        raise ConfigError(f"Model {where}: {reason}.", param="model") from error


def _broken_connections() -> tuple[type[Exception], ...]:
    """Return the errors of the HTTP library of the hub's client that are no OSError."""
    modules = [sys.modules.get(name) for name in ("httpx2", "httpx")]
    return tuple(module.TransportError for module in modules if module is not None)
