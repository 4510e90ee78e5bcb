"""Where the files lie, and how they become URLs."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sensorium.config import suggestion
from sensorium.errors import InvalidRequestError

FOLDER = Path(__file__).parent / "files"


@dataclass(frozen=True)
class Asset:
    """A file of the package, by its name. Raises InvalidRequestError for a name that there is not."""

    name: str
    names: ClassVar[tuple[str, ...]] = ()
    """Names that there are."""
    suffix: ClassVar[str] = ""
    media_type: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.name not in self.names:
            raise InvalidRequestError(
                f"There is no {type(self).__name__} {self.name!r}; there are {', '.join(self.names)}."
                f"{suggestion(str(self.name), list(self.names))}",
                param="name",
            )

    @property
    def path(self) -> Path:
        """The file."""
        return FOLDER / f"{self.name}{self.suffix}"

    def get_local_path(self) -> Path:
        """The file, for code that asks an asset for it."""
        return self.path

    @property
    def url(self) -> str:
        """A ``file:`` URL, short enough for an id; ``LLM`` and ``AsyncLLM`` take it without further options."""
        return self.path.as_uri()

    @property
    def data_url(self) -> str:
        """A ``data:`` URL of the file, which every server takes, wherever it runs."""
        return f"data:{self.media_type};base64,{base64.b64encode(self.path.read_bytes()).decode()}"
