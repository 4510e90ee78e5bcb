"""Paths and ``file:`` URLs that lead out of the allowed folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.reliability.asking import Offline, Service, image, place, text
from tests.reliability.media import picture

OUTSIDE = (
    "{folder}/../secret.png",
    "{folder}/inner/../../secret.png",
    "file://{folder}/../secret.png",
    "file://{folder}/%2e%2e/secret.png",
    "file://{folder}/%2E%2e%2Fsecret.png",
    "file://{folder}/..%2fsecret.png",
    "file://{folder}/%252e%252e/secret.png",
    "file://{folder}/.%2e/secret.png",
    "file://localhost{folder}/../secret.png",
    "file:{folder}/../secret.png",
    "FILE://{folder}/../secret.png",
    "file://{folder}-evil/secret.png",
    "{folder}-evil/secret.png",
    "file://{folder}/link.png",
    "file://{folder}/link/secret.png",
    "{folder}/loop",
    "file:///etc/hostname",
    "/proc/self/environ",
    "/proc/self/root{folder}/../secret.png",
    "../secret.png",
    "~/secret.png",
)
NO_FILE = (
    "{folder}",
    "{folder}/",
    "{folder}/.",
    "{folder}/inner",
    "{folder}/pipe",
    "{folder}/socket",
    "{folder}/absent.png",
    "{folder}/picture.png/x",
    "{folder}/picture.png%00.jpg",
    "file://{folder}/picture.png%00.jpg",
    "file://elsewhere{folder}/picture.png",
    "file://127.0.0.1{folder}/picture.png",
    "file:",
    "file://",
    "{folder}/" + "x" * 5000,
)


@pytest.fixture(scope="module")
def traps(folder: Path) -> Path:
    """The allowed folder, with links out of it, a pipe that nobody writes to, and a secret
    beside it.
    """
    picture().save(folder.parent / "secret.png")
    evil = folder.parent / f"{folder.name}-evil"
    evil.mkdir()
    picture().save(evil / "secret.png")
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "link").symlink_to(folder.parent)
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "inside.png").symlink_to(folder / "picture.png")
    os.mkfifo(folder / "pipe")
    os.mknod(folder / "socket", 0o140600)
    return folder


@pytest.mark.parametrize("url", [*OUTSIDE, *NO_FILE])
def test_nothing_outside_the_folder_is_read(
    anywhere: Service | Offline, traps: Path, url: str
) -> None:
    """Traversal, encoded traversal, links, other hosts, folders, pipes.

    Refused, and the path is not repeated.
    """
    part = image(url.format(folder=traps))
    answer = anywhere.ask(text("What is this?"), part)
    answer.is_refusal(400, "media_refused", place(part, 1))
    assert str(traps) not in answer.error["message"]


@pytest.mark.parametrize(
    "url",
    [
        "{folder}/picture.png",
        "file://{folder}/picture.png",
        "file://localhost{folder}/inner/picture.png",
        "file://{folder}/inner/../%70icture.png",
        "file://{folder}/inside.png",
    ],
)
def test_what_lies_below_the_folder_is_read(
    anywhere: Service | Offline, traps: Path, url: str
) -> None:
    """What the other tests refuse is refused for what it is: these paths, as odd, work."""
    assert anywhere.ask(image(url.format(folder=traps)), text("What is this?")).status == 200
