"""Batches of an application whose front end answers at once: their ends and their limits."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import resource
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sensorium.errors import InvalidRequestError, MediaTooLargeError, OverloadedError
from sensorium.server.batches.store import Batch, BatchStore
from sensorium.server.files import store
from sensorium.server.files.store import FileStore
from tests.server.fake_frontend import FakeFrontend
from tests.server.harness import App, until

CHAT = "/v1/chat/completions"
WINDOW = 3600
LINE = {
    "method": "POST",
    "url": CHAT,
    "body": {"messages": [{"role": "user", "content": "Hi"}]},
}


class Batches:
    """The stores of an application."""

    def __init__(self, folder: Path, frontend: FakeFrontend | None = None, **config: Any) -> None:
        self.app = App(frontend, file_folder=str(folder), **config)
        self.files: FileStore = self.app.app.state.context.files
        self.batches: BatchStore = self.app.app.state.context.batches

    async def file(self, content: bytes, purpose: str = "batch", tenant: str = "") -> str:
        new = self.files.create(tenant)
        await new.write(content)
        return (await new.finish("in.jsonl", purpose, None)).id

    async def begin(self, content: bytes, seconds: int = WINDOW, tenant: str = "") -> Batch:
        return self.batches.create(
            tenant,
            endpoint=CHAT,
            input_file_id=await self.file(content, tenant=tenant),
            completion_window="1h",
            seconds=seconds,
        )

    async def ended(self, content: bytes, seconds: int = WINDOW, tenant: str = "") -> Batch:
        batch = await self.begin(content, seconds, tenant)
        await until(lambda: batch.has_ended)
        return batch

    def read(self, file_id: str | None) -> list[Any]:
        assert file_id is not None
        return [json.loads(line) for line in self.files.get(file_id, "").read().splitlines()]

    async def close(self) -> None:
        await self.batches.close()
        self.files.close()


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[Batches]:
    made = Batches(tmp_path)
    yield made
    await made.close()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def end_window(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Returns what ends the time of the batch that runs."""
    limits: list[asyncio.Timeout] = []
    timeout = asyncio.timeout

    def noted(seconds: float | None) -> asyncio.Timeout:
        limit = timeout(seconds)
        if seconds is not None and seconds > WINDOW / 2:
            limits.append(limit)
        return limit

    def end() -> None:
        [limit] = limits
        limit.reschedule(asyncio.get_running_loop().time())

    monkeypatch.setattr(asyncio, "timeout", noted)
    return end


def lines(num: int) -> bytes:
    return b"".join(
        json.dumps({"custom_id": f"id {i}", **LINE}).encode() + b"\n" for i in range(num)
    )


async def test_a_batch_runs_to_its_end(made: Batches) -> None:
    batch = await made.ended(lines(5))
    assert batch.status == "completed"
    answers = made.read(batch.output_file_id)
    assert sorted(answer["custom_id"] for answer in answers) == [f"id {i}" for i in range(5)]
    assert batch.error_file_id is None
    shown = batch.to_dict()
    assert shown["request_counts"] == {"total": 5, "completed": 5, "failed": 0}
    assert shown["usage"]["output_tokens"] > 0
    assert shown["in_progress_at"] <= shown["finalizing_at"] <= shown["completed_at"]


async def test_what_is_not_reached_in_time_is_told(made: Batches) -> None:
    batch = await made.ended(lines(3), seconds=0)
    assert batch.status == "expired"
    errors = made.read(batch.error_file_id)
    assert [error["custom_id"] for error in errors] == ["id 0", "id 1", "id 2"]
    assert {error["error"]["code"] for error in errors} == {"batch_expired"}
    assert batch.num_failed == 3


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"", "empty_file"), (b"\n \n", "empty_file"), (lines(9), "too_many_lines")],
)
async def test_inputs_that_are_refused(tmp_path: Path, content: bytes, code: str) -> None:
    made = Batches(tmp_path, max_batch_lines=8)
    batch = await made.ended(content)
    assert batch.status == "failed"
    assert [error["code"] for error in batch.errors] == [code]
    await made.close()


async def test_many_bad_lines_are_named_up_to_a_number(made: Batches) -> None:
    batch = await made.ended(b"x\n" * 5000)
    assert batch.status == "failed"
    assert len(batch.errors) == 100


async def test_what_was_answered_is_kept_when_there_is_no_room(tmp_path: Path) -> None:
    made = Batches(tmp_path, max_stored_file_bytes=len(lines(30)) + 3000, max_batch_requests=1)
    batch = await made.ended(lines(30))
    assert batch.status == "failed"
    assert batch.errors[0]["code"] == "overloaded"
    assert 0 < len(made.read(batch.output_file_id)) == batch.num_completed < 30
    await made.close()


@contextlib.contextmanager
def small_disk(num_bytes: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes: the system then refuses writes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("waiting", [1, 1000, 1 << 20])
async def test_lines_that_a_full_disk_does_not_take_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: int
) -> None:
    monkeypatch.setattr(store, "BUFFER_BYTES", waiting)
    frontend = FakeFrontend()
    made = Batches(tmp_path, frontend, max_batch_requests=1)
    batch = await made.begin(lines(30))
    with small_disk(3000):
        await until(lambda: batch.has_ended)
    assert batch.status == "failed"
    assert batch.errors[0]["code"] == "overloaded"
    lost = [int(e["message"].split()[0]) for e in batch.errors if e["code"] == "lines_lost"]
    kept = made.read(batch.output_file_id)  # of whole lines
    assert len(kept) == batch.num_completed
    refused = waiting < 1 << 20  # the write that failed; else all are written at the end
    assert len(frontend.calls) == len(kept) + sum(lost) + refused
    assert bool(lost) == (waiting > 1)
    assert bool(kept) == refused
    assert made.files.num_bytes == sum(file.num_bytes for file in made.files.of_tenant(""))
    assert made.files.num_bytes == sum(f.stat().st_size for f in tmp_path.rglob("file-*"))
    await made.close()


async def test_a_cancelled_batch_has_no_lines_that_expired(
    tmp_path: Path, end_window: Callable[[], None]
) -> None:
    frontend = slow_after(2)
    made = Batches(tmp_path, frontend, max_batch_requests=1)
    batch = await made.begin(lines(5))
    await until(lambda: len(frontend.calls) == 3)
    made.batches.cancel(batch.id, "")
    end_window()
    await until(lambda: batch.has_ended)
    assert batch.status == "cancelled"
    assert (batch.num_completed, batch.num_failed, batch.error_file_id) == (2, 0, None)
    await made.close()


async def test_a_file_of_another_purpose_is_refused(made: Batches) -> None:
    file_id = await made.file(lines(1), "vision")
    with pytest.raises(InvalidRequestError, match="vision"):
        made.batches.create(
            "", endpoint=CHAT, input_file_id=file_id, completion_window="1h", seconds=9
        )


async def test_the_number_of_batches_is_bounded(tmp_path: Path) -> None:
    frontend = FakeFrontend(before=lambda call: forever())
    made = Batches(tmp_path, frontend, max_batches=2)
    running = await made.begin(lines(1))
    ended = await made.ended(b"x\n")
    third = await made.begin(lines(1))
    assert [batch.id for batch in made.batches.of_tenant("")] == [running.id, third.id]
    assert ended.id not in {running.id, third.id}
    with pytest.raises(OverloadedError, match="--max-batches"):
        await made.begin(lines(1))
    await until(lambda: len(frontend.calls) == 2)
    await made.close()
    assert all(call.ended for call in frontend.calls)


async def forever() -> None:
    await asyncio.Event().wait()


async def test_a_request_that_is_refused_for_now_is_tried_again(tmp_path: Path) -> None:
    frontend = FakeFrontend()
    refused = 0

    def busy(call: Any) -> None:
        nonlocal refused
        if refused < 2:
            refused += 1
            raise OverloadedError("Not now.")

    frontend.before = busy
    made = Batches(tmp_path, frontend)
    batch = await made.ended(lines(3))
    assert batch.status == "completed"
    assert batch.num_completed == 3
    assert refused == 2
    await made.close()


def slow_after(num: int) -> FakeFrontend:
    """Return a front end that answers some requests and no more."""
    numbers = itertools.count()
    return FakeFrontend(before=lambda call: forever() if next(numbers) >= num else None)


@pytest.mark.parametrize("room", [1 << 20, 3000], ids=["room", "no room"])
async def test_what_was_answered_in_time_is_kept(
    tmp_path: Path, room: int, end_window: Callable[[], None]
) -> None:
    content = lines(30)
    made = Batches(
        tmp_path, slow_after(3), max_batch_requests=4, max_stored_file_bytes=len(content) + room
    )
    batch = await made.begin(content)
    await until(lambda: batch.num_completed == 3)
    end_window()
    await until(lambda: batch.has_ended)
    answers, errors = made.read(batch.output_file_id), made.read(batch.error_file_id)
    assert len(answers) == batch.num_completed == 3
    assert len(errors) == batch.num_failed
    ids = [line["custom_id"] for line in answers + errors]
    assert len(ids) == len(set(ids))
    if room > 3000:
        assert batch.status == "expired"
        assert len(ids) == 30
    else:
        assert batch.status == "failed"
        assert batch.errors[0]["code"] == "overloaded"
        assert 3 < len(ids) < 30
    await made.close()


async def test_one_key_does_not_take_all_room_of_batches(tmp_path: Path) -> None:
    made = Batches(tmp_path, slow_after(0), max_batches=4, api_key=("a", "b", "c"))
    for _ in range(2):
        await made.begin(lines(1), tenant="a")
    with pytest.raises(OverloadedError, match="at most 2"):
        await made.begin(lines(1), tenant="a")
    kept = [await made.ended(b"x\n", tenant="b"), await made.ended(b"x\n", tenant="b")]
    kept.append(await made.ended(b"x\n", tenant="b"))
    assert made.batches.of_tenant("b") == kept[1:]
    new = await made.begin(lines(1), tenant="c")  # in place of one of those who have more
    assert made.batches.of_tenant("b") == kept[2:]
    assert made.batches.of_tenant("c") == [new]
    with pytest.raises(OverloadedError):
        await made.begin(lines(1), tenant="c")
    assert made.batches.of_tenant("b") == kept[2:]
    await made.close()


async def test_one_key_does_not_take_all_room_of_files(tmp_path: Path) -> None:
    made = Batches(tmp_path, max_stored_files=4, max_stored_file_bytes=100, api_key=("a", "b"))
    new = made.files.create("a")
    await new.write(bytes(50))
    with pytest.raises(MediaTooLargeError, match="more than 50"):
        await new.write(b"x")
    second = made.files.create("a")
    with pytest.raises(OverloadedError, match="at most 50"):
        await second.write(b"x")
    second.discard()
    made.files.create("a")
    with pytest.raises(OverloadedError, match="at most 2"):
        made.files.create("a")
    other = made.files.create("b")
    await other.write(bytes(50))
    new.discard()
    other.discard()
    assert (made.files.num_files, made.files.num_bytes) == (1, 0)
    await made.close()
