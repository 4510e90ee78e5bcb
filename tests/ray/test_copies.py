"""Features of other processes in shared memory: once each, the latest kept, room made for new ones."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping

import numpy as np
import pytest

from sensorium.errors import OverloadedError
from sensorium.multimodal.items import Features
from sensorium.multimodal.shared_memory import SharedArrays, SharedArraysFolder
from sensorium.ray.media.copies import FeatureCopies

SIZE = 1000


class Source:
    """Where features come from; counts how often they were asked for."""

    def __init__(self) -> None:
        self.num_loads = 0
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()

    async def load(self) -> Features:
        self.num_loads += 1
        await self.may_go_on.wait()
        return Features("image", {"pixels": np.full(SIZE, 7, np.uint8)}, 3, {"a": 1})


async def test_each_is_copied_once_and_the_latest_are_kept() -> None:
    copies, source = FeatureCopies(2 * SIZE), Source()
    first = await copies.get(b"a", source.load)
    assert isinstance(first.arrays, SharedArrays)
    assert first.arrays["pixels"].tolist() == [7] * SIZE
    assert (first.num_embeds, first.meta) == (3, {"a": 1})
    for key in (b"b", b"a", b"c", b"a"):
        await copies.get(key, source.load)
    assert source.num_loads == 3
    await copies.get(b"b", source.load)
    assert source.num_loads == 4, "b was used longest ago when c came"
    copies.close()


async def test_one_who_leaves_takes_nothing_from_others_that_wait() -> None:
    copies, source = FeatureCopies(2 * SIZE), Source()
    source.may_go_on.clear()
    first, second = (asyncio.create_task(copies.get(b"a", source.load)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    source.may_go_on.set()
    assert (await second).num_embeds == 3
    assert source.num_loads == 1
    copies.close()


@pytest.mark.parametrize("helps", [True, False])
async def test_what_is_kept_makes_room(monkeypatch: pytest.MonkeyPatch, helps: bool) -> None:
    copies, source = FeatureCopies(2 * SIZE), Source()
    await copies.get(b"a", source.load)
    failures = [errno.ENOSPC] if helps else [errno.ENOSPC] * 2
    write = SharedArraysFolder.write

    def full(folder: SharedArraysFolder, arrays: Mapping[str, np.ndarray]) -> SharedArrays:
        if failures:
            raise OSError(failures.pop(), "no room")
        return write(folder, arrays)

    monkeypatch.setattr(SharedArraysFolder, "write", full)
    if helps:
        await copies.get(b"b", source.load)
    else:
        with pytest.raises(OverloadedError, match="try again"):
            await copies.get(b"b", source.load)
    assert source.num_loads == 2
    await copies.get(b"a", source.load)
    assert source.num_loads == 3, "a made room"
    copies.close()
