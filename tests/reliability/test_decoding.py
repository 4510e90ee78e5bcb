"""Decoders that hang, take all memory, or die.

The request that has the file gets an error, and nobody else notices.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import struct
import zlib
from collections.abc import Iterator

import psutil
import pytest

from tests.multimodal.clips import make_clip
from tests.parts import build_llm
from tests.reliability.asking import (
    Answer,
    Client,
    Offline,
    Service,
    flags,
    image,
    log_of,
    place,
    serving,
    text,
    until,
    video,
)
from tests.reliability.conftest import NARROW
from tests.reliability.media import data_url, endless_clip, picture_url, png, png_chunk
from tests.reliability.test_bombs import changed

QUESTION = text("What is shown?")
HASTY = {"media_decode_timeout": 2.0, "num_media_workers": 2, "num_kv_blocks": 200}


@pytest.fixture(scope="module")
def hasty_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving("demo", tmp_path_factory.mktemp("hasty"), flags(HASTY)) as service:
        yield service


@pytest.fixture
def hasty(hasty_server: Service) -> Iterator[Service]:
    """A server whose media workers have little time."""
    yield hasty_server
    hasty_server.is_well()


@pytest.fixture(scope="module")
def hasty_offline() -> Iterator[Offline]:
    with build_llm("demo", **HASTY) as parts:
        yield Offline(parts)


@pytest.fixture(scope="module")
def narrow_offline() -> Iterator[Offline]:
    with build_llm("demo", **NARROW) as parts:
        yield Offline(parts)


@pytest.fixture(params=["narrow", "narrow_offline"])
def limited(request: pytest.FixtureRequest) -> Service | Offline:
    found: Service | Offline = request.getfixturevalue(request.param)
    return found


_seeds = iter(range(10_000, 20_000))


def fresh_picture(model: Service | Offline) -> Answer:
    """The answer about a picture that no cache has."""
    return model.ask(image(picture_url(next(_seeds))), QUESTION)


def large_picture() -> str:
    """A PNG of a few kilobytes, within the limit on pixels, that takes 192 MB when it is decoded."""
    rows = zlib.compress(bytes(1001 * 8000), 9)
    return data_url(png(8000, 8000, png_chunk(b"IDAT", rows), depth=1, colours=0))


def millions_of_samples() -> bytes:
    """Two megabytes of MP4 that say, in a table of one size for all, that they are 33 million
    samples.
    """
    data = changed(make_clip("mp4", 6), b"stsz", 4, 1, 33_000_000)
    return data + struct.pack(">I", 2_200_000) + b"free" + bytes(2_199_992)


@pytest.mark.parametrize("where", ["hasty", "hasty_offline"])
def test_a_decode_over_the_deadline(request: pytest.FixtureRequest, where: str) -> None:
    """A file that keeps a decoder busy for ever costs its request 400 once the time is over.

    The message names the flag.
    """
    limited: Service | Offline = request.getfixturevalue(where)
    part = video(endless_clip())
    answer = limited.ask(part, QUESTION)
    answer.is_refusal(400, "media_undecodable", place(part))
    assert "--media-decode-timeout" in answer.error["message"]
    assert fresh_picture(limited).status == 200


def test_others_are_served_while_one_hangs(narrow: Service) -> None:
    """With one worker at an endless file the other ones go on."""
    hanging = Client(narrow, video(endless_clip()), QUESTION)
    until(lambda: narrow.counters()["media_workers_busy"] >= 1)
    for _ in range(5):
        assert fresh_picture(narrow).status == 200
    assert narrow.counters()["media_workers_busy"] >= 1
    hanging.leave()
    until(lambda: narrow.counters()["media_workers_busy"] == 0)


def test_a_decode_over_the_memory_limit(limited: Service | Offline) -> None:
    """A file that grows beyond a worker's memory is refused with the flag's name."""
    part = image(large_picture())
    answer = limited.ask(part, QUESTION)
    answer.is_refusal(413, "media_too_large", place(part))
    assert "--media-worker-memory-gb" in answer.error["message"]
    assert fresh_picture(limited).status == 200


def test_a_table_of_thirty_three_million_samples(limited: Service | Offline) -> None:
    """What FFmpeg makes of the table when it opens the file takes most of a GiB.

    It ends at the worker's limit.
    """
    part = video(data_url(millions_of_samples(), "video/mp4"))
    answer = limited.ask(part, QUESTION)
    answer.is_discreet()
    assert answer.error["code"] in ("media_undecodable", "media_too_large")
    assert answer.error["param"] == place(part)
    assert fresh_picture(limited).status == 200


def decoding(service: Service) -> list[psutil.Process]:
    """The process that forks the media workers, and these."""
    found = []
    for process in service.server.children():
        with contextlib.suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
            if "sensorium.engine.prompts.media_worker" in process.cmdline():
                found.append(process)
    return found


def workers_of(service: Service) -> list[psutil.Process]:
    """The processes that decode."""
    found = decoding(service)
    return [process for process in found if process.parent() in found]


def fork_server_of(service: Service) -> psutil.Process:
    """The one that has forked them."""
    found = decoding(service)
    (parent,) = [process for process in found if process.parent() not in found]
    return parent


def seconds_used(service: Service) -> dict[int, float]:
    """Processor time of each process that decodes, by its id."""
    found = {}
    for process in workers_of(service):
        with contextlib.suppress(psutil.NoSuchProcess):
            found[process.pid] = process.cpu_times().user
    return found


def busy_worker(service: Service) -> int:
    """The process that is at an item, when there is one: the only one that uses the processor."""
    before, busy = seconds_used(service), set[int]()

    def found() -> bool:
        now = seconds_used(service).items()
        busy.update(pid for pid, seconds in now if seconds > before.get(pid, 0.0) + 0.1)
        return bool(busy)

    until(found)
    (pid,) = busy
    return pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_worker_that_dies_in_the_middle(tight: Service, number: signal.Signals) -> None:
    """Killed, as by the system that has no memory left, or crashed by a file.

    That request gets 400, others in flight are answered, and another worker takes its place.
    """
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        before = tight.counters()["media_worker_restarts_total"]
        hanging = pool.submit(tight.ask, video(endless_clip()), QUESTION)
        until(lambda: tight.counters()["media_workers_busy"] >= 1)
        busy = busy_worker(tight)
        beside = [pool.submit(fresh_picture, tight) for _ in range(3)]
        os.kill(busy, number)
        answer = hanging.result()
        answer.is_refusal(400, "media_undecodable", "messages[0].content[0].video_url")
        assert "took longer" not in answer.error["message"]
        assert [other.result().status for other in beside] == [200, 200, 200]
    assert tight.counters()["media_worker_restarts_total"] == before + 1
    assert fresh_picture(tight).status == 200


def test_all_workers_and_their_parent_killed(narrow: Service) -> None:
    """The process that forks the workers takes them along when it dies.

    The next item starts another one.
    """
    parent = fork_server_of(narrow)
    os.kill(parent.pid, signal.SIGKILL)
    until(lambda: not parent.is_running() or parent.status() == psutil.STATUS_ZOMBIE)
    answers = [fresh_picture(narrow) for _ in range(3)]
    for answer in answers:  # one that was sent to a worker that was about to die is refused
        if answer.status == 503:
            assert answer.error["code"] == "engine_unavailable"
        else:
            answer.is_discreet()
    assert answers[-1].status == 200
    assert fork_server_of(narrow).pid != parent.pid


def test_the_log_names_no_reason_to_worry(hasty: Service) -> None:
    """What happened to workers is a line each, and no trace."""
    assert hasty.ask(video(endless_clip()), QUESTION).status == 400
    log = log_of(hasty)
    assert "a media worker was killed: it took too long" in log
    assert "Traceback" not in log
