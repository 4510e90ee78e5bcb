"""Files of the package, and their URLs."""

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
    """A file of the package.

    Raises:
        InvalidRequestError: there is no file of this name.
    """

    name: str
    names: ClassVar[tuple[str, ...]] = ()
    """Available names."""
    suffix: ClassVar[str] = ""
    media_type: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check the name. Raises InvalidRequestError."""
        if self.name not in self.names:
            raise InvalidRequestError(
                f"There is no {type(self).__name__} {self.name!r}; there are "
                f"{', '.join(self.names)}.{suggestion(str(self.name), list(self.names))}",
                param="name",
            )

    @property
    def path(self) -> Path:
        """Path of the file."""
        return FOLDER / f"{self.name}{self.suffix}"

    def get_local_path(self) -> Path:
        """Return the path of the file, as vLLM's assets do."""
        return self.path

    @property
    def url(self) -> str:
        """``file:`` URL, which ``LLM`` and ``AsyncLLM`` accept without further options."""
        return self.path.as_uri()

    @property
    def data_url(self) -> str:
        """``data:`` URL of the file, which every server accepts."""
        return f"data:{self.media_type};base64,{base64.b64encode(self.path.read_bytes()).decode()}"
