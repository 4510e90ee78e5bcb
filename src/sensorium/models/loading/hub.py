"""Downloads from the Hugging Face hub, what they would take, and errors that say what to do."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sensorium.errors import ConfigError


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

    Files that are in the cache stay; a connection that breaks off is resumed. Returns their folder.
    Raises ConfigError with advice.
    """
    from huggingface_hub import snapshot_download

    with _errors_explained(model, revision):
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=list(wanted),
                ignore_patterns=list(ignored),
                cache_dir=download_dir,
                tqdm_class=_bars(),
            )
        )


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
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    found = b""
    with _errors_explained(model, revision):
        headers = {**build_hf_headers(), "Range": f"bytes=0-{num_bytes - 1}"}
        url = hf_hub_url(model, file, revision=revision)
        with get_session().stream("GET", url, headers=headers, follow_redirects=True) as answer:
            hf_raise_for_status(answer)
            for piece in answer.iter_bytes():
                found += piece
                if len(found) >= num_bytes:  # a server may ignore the range
                    break
    return found[:num_bytes]


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
