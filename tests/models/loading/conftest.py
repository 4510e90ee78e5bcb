"""Fixtures for tests of loading."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sensorium.models.loading import stored


@pytest.fixture(scope="package", autouse=True)
def kept_free_bytes() -> Iterator[None]:
    """Let writers fill the disk: an almost full one, as machines of tests have, changes nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "FREE_BYTES", 0)
        yield
