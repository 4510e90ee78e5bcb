"""The environment variables of Sensorium, and its folders of caches.

Values that make no sense are refused, except for the log level.

``kernels/cpu/threads.py`` looks at variables of other programs besides (OpenMP's and the C
library's).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sensorium.errors import ConfigError

LOG_LEVEL = "SENSORIUM_LOG_LEVEL"
LOG_LEVELS = ("debug", "info", "warning", "error")
PROGRESS = "SENSORIUM_PROGRESS"


def log_level(environ: Mapping[str, str] | None = None) -> str:
    """The level in ``SENSORIUM_LOG_LEVEL``, in capitals as ``logging`` has it.

    ``INFO`` when it is unset or unknown.
    """
    environ = os.environ if environ is None else environ
    level = environ.get(LOG_LEVEL, "").lower()
    return level.upper() if level in LOG_LEVELS else "INFO"


def set_log_level(level: str | None) -> None:
    """Set the level for this process and those it starts; None keeps that of the environment."""
    os.environ[LOG_LEVEL] = level or log_level().lower()


def progress_wanted(environ: Mapping[str, str] | None = None) -> bool:
    """Return whether progress of long tasks is shown: unless ``SENSORIUM_PROGRESS`` is 0."""
    environ = os.environ if environ is None else environ
    return environ.get(PROGRESS, "1").lower() not in ("0", "false", "off", "no")


def set_progress(wanted: bool) -> None:
    """Show or hide progress in this process and those that it starts."""
    os.environ[PROGRESS] = "1" if wanted else "0"


def cache_root(environ: Mapping[str, str] | None = None) -> Path:
    """The folder of caches: ``XDG_CACHE_HOME``, or ``~/.cache`` when it is unset.

    It may be relative, which is to be ignored by XDG's rule; "~" stays for a user without a home.
    """
    environ = os.environ if environ is None else environ
    return Path(environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"))


def make_private(folder: Path) -> None:
    """Make a folder that only this user may enter. Raises OSError for one of another user."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "it belongs to another user or is a link")
    if stat.S_IMODE(status.st_mode) != 0o700:
        folder.chmod(0o700)


_PREFIXES = ("SENSORIUM", "VLLM", "APHRODITE")
"""Variables that other engines have, too; the first that is set counts."""

_MEDIA_ENVIRONMENT = {
    "MEDIA_URL_ALLOW_REDIRECTS": "media_url_allow_redirects",
    "IMAGE_FETCH_TIMEOUT": "image_fetch_timeout",
    "VIDEO_FETCH_TIMEOUT": "video_fetch_timeout",
    "AUDIO_FETCH_TIMEOUT": "audio_fetch_timeout",
}


def media_environment(environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Media settings of the environment.

    ``SENSORIUM_IMAGE_FETCH_TIMEOUT`` and its kin, else the names of vLLM (``VLLM_…``), else those
    of its fork Aphrodite (``APHRODITE_…``).

    Raises ConfigError for a value that cannot be read.
    """
    environ = os.environ if environ is None else environ
    found: dict[str, Any] = {}
    for suffix, name in _MEDIA_ENVIRONMENT.items():
        for variable in (f"{prefix}_{suffix}" for prefix in _PREFIXES):
            if variable in environ:
                found[name] = _environment_value(variable, environ[variable], suffix)
                break
    return found


def environment_options(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the options that the environment sets, each with the variable that does."""
    environ = os.environ if environ is None else environ
    found: dict[str, str] = {}
    for suffix, name in _MEDIA_ENVIRONMENT.items():
        variables = [f"{prefix}_{suffix}" for prefix in _PREFIXES]
        set_here = [variable for variable in variables if variable in environ]
        if set_here:
            found[name] = set_here[0]
    if environ.get(LOG_LEVEL, "").lower() in LOG_LEVELS:
        found["log_level"] = LOG_LEVEL
    return found


API_KEYS = tuple(f"{prefix}_API_KEY" for prefix in _PREFIXES)
"""Variables that hold an API key; of the first that is set the value counts."""


def api_keys_of_environment(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The API key in ``SENSORIUM_API_KEY``, ``VLLM_API_KEY`` or ``APHRODITE_API_KEY``.

    None where all are empty.
    """
    environ = os.environ if environ is None else environ
    return next(((environ[name],) for name in API_KEYS if environ.get(name)), ())


def unread_variables(environ: Mapping[str, str] | None = None) -> list[str]:
    """Return the ``VLLM_`` variables that are set and have no effect here, in order."""
    environ = os.environ if environ is None else environ
    read = {"VLLM_API_KEY", *(f"VLLM_{suffix}" for suffix in _MEDIA_ENVIRONMENT)}
    return sorted(name for name in environ if name.startswith("VLLM_") and name not in read)


def _environment_value(variable: str, text: str, suffix: str) -> bool | float:
    if suffix == "MEDIA_URL_ALLOW_REDIRECTS":
        if text not in ("0", "1"):
            raise ConfigError(f"{variable} must be 0 or 1, got {text!r}.", param=variable)
        return text == "1"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.001 <= seconds <= 3600.0:
        raise ConfigError(
            f"{variable} must be a number of seconds from 0.001 to 3600, got {text!r}.",
            param=variable,
        )
    return seconds
