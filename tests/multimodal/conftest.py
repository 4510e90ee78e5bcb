"""Fixtures of the media tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.multimodal.pipelines import Setup


@pytest.fixture
def make() -> Iterator[Callable[..., Setup]]:
    made: list[Setup] = []

    def build(**options) -> Setup:
        made.append(Setup(**options))
        return made[-1]

    yield build
    for setup in made:
        assert setup.cache.num_pinned == 0
        setup.cache.check_integrity()
        setup.pipeline.close()
