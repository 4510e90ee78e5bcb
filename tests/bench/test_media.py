"""The measurement of media handling: its arithmetic, its report, and the servers that it starts."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SERVER = """
import json, subprocess, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "engine"])

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        self.answer(200, {"data": [{"id": "m"}]})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["messages"][0]["content"][-1]["text"] == "bad":
            self.answer(503, {"error": {"code": "engine_unavailable", "message": "not now"}})
        else:
            self.answer(200, {"choices": [{"message": {"content": body["model"]}}]})
    def log_message(self, *args):
        pass

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
METRICS = """\
# TYPE sensorium:media_stage_items_total counter
sensorium:media_stage_items_total{model_name="m",stage="decode"} 3
sensorium:media_stage_items_total{model_name="m",stage="fetch"} 1
# TYPE sensorium:request_success_total counter
sensorium:request_success_total{model_name="m",finished_reason="stop"} 2
sensorium:request_success_total{model_name="m",finished_reason="length"} 5
# TYPE sensorium:mm_cache_entries gauge
sensorium:mm_cache_entries{model_name="m"} 9
"""


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The scripts as modules."""
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("served", "media_sharing", "media_recovery", "media_peers", "media_report", "media")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return {name: importlib.import_module(name) for name in names}


# --- servers ---------------------------------------------------------------------------------------------------------


def is_engine(process: psutil.Process) -> bool:
    return process.cmdline()[-1:] == ["engine"]


@pytest.mark.slow
async def test_a_served_process_is_asked_frozen_and_ended_with_its_children(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = modules["served"]
    monkeypatch.setattr(served, "CHILD_TIMEOUT", 0.01)
    server = served.ServedProcess(
        lambda port: [sys.executable, "-c", SERVER, str(port)],
        tmp_path / "log",
        is_engine=is_engine,
    )
    async with server, served.Asker(server.base_url) as asker:
        assert await asker.model() == "m"
        before = server.processor_times()
        good = await asker.ask(served.chat_body("m", "good"))
        assert (good.status, good.code, good.text) == (200, "", "m")
        bad = await asker.ask(served.chat_body("m", "bad"))
        assert (bad.status, bad.code, bad.text) == (503, "engine_unavailable", "not now")
        with pytest.raises(RuntimeError, match="503 engine_unavailable not now"):
            await asker.good(served.chat_body("m", "bad"))
        times = server.processor_times()
        [engine] = server.engines()
        assert (len(times.front), list(times.engine)) == (1, [engine.pid])
        assert times.since(before)[0] > 0
        server.freeze()
        processes = server.processes()
        async with asyncio.timeout(30):
            while {process.status() for process in processes} != {psutil.STATUS_STOPPED}:
                await asyncio.sleep(0.001)
        server.thaw()
        assert (await asker.ask(served.chat_body("m", "good"))).status == 200
        server.freeze()
    assert not server.alive
    assert not any(process.is_running() for process in processes)


async def test_a_server_that_ends_at_once_is_an_error_that_names_its_log(
    modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", "print('no such model')"]
    server = modules["served"].ServedProcess(
        lambda port: command, tmp_path / "server.log", is_engine=is_engine
    )
    with pytest.raises(RuntimeError, match=r"the server ended; see .*server\.log"):
        async with server:
            pass
    assert (tmp_path / "server.log").read_text() == "no such model\n"


async def test_no_server_is_a_lost_connection(modules: dict[str, ModuleType]) -> None:
    served = modules["served"]
    async with served.Asker("http://127.0.0.1:9") as asker:
        reply = await asker.ask(b"{}")
        assert (reply.status, reply.code, await asker.health()) == (0, served.LOST, 0)


def test_processor_seconds_are_those_of_the_process(modules: dict[str, ModuleType]) -> None:
    seconds = modules["served"].processor_seconds
    assert seconds(os.getpid()) == pytest.approx(time.process_time(), abs=0.05)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with pytest.raises(OSError):
        seconds(ended.pid)


def test_processor_time_of_a_new_process_counts_from_its_beginning(
    modules: dict[str, ModuleType],
) -> None:
    times = modules["served"].Times
    before = times({1: 10.0, 2: 5.0}, {7: 1.0})
    now = times({1: 10.5, 3: 0.25}, {7: 3.0})
    assert now.since(before) == (0.75, 2.0)


def test_counters_are_read_by_stage_and_summed_over_other_labels(
    modules: dict[str, ModuleType],
) -> None:
    served = modules["served"]
    counters = served.read_counters(METRICS)
    assert counters == {
        "media_stage_items/decode": 3,
        "media_stage_items/fetch": 1,
        "request_success": 7,
    }
    names = ("media_stage_items/decode", "mm_encoder_items")
    assert served.rises(names, {"media_stage_items/decode": 1}, counters) == {
        "media_stage_items/decode": 2,
        "mm_encoder_items": None,
    }


def test_the_media_host_logs_what_is_fetched(modules: dict[str, ModuleType]) -> None:
    with modules["served"].MediaHost() as host:
        urls = [host.add("/a", b"first"), host.add("/b", b"second", 0.001)]
        files = [urllib.request.urlopen(url).read() for url in (*urls, urls[0])]
        assert files == [b"first", b"second", b"first"]
        assert host.fetched == ["/a", "/b", "/a"]


# --- what repeats ----------------------------------------------------------------------------------------------------


def test_the_forms_of_a_known_image_differ_in_the_image_only(
    modules: dict[str, ModuleType],
) -> None:
    forms = modules["media_sharing"].known_forms("m", "data:image/jpeg;base64,AAAA")
    parts = {name: json.loads(body)["messages"][0]["content"] for name, body in forms.items()}
    assert [part["type"] for part in parts["image"]] == ["image_url", "text"]
    assert parts["image"][1:] == parts["uuid"][1:] == parts["text"] == parts["again"]
    assert parts["uuid"][0] == {"type": "image_url", "image_url": None, "uuid": "known-image"}


def test_what_an_image_adds_is_the_median_of_the_rounds(modules: dict[str, ModuleType]) -> None:
    values = {
        "text": [(0.001, 0.010), (0.002, 0.010), (0.003, 0.010)],
        "image": [(0.002, 0.010), (0.005, 0.013), (0.005, 0.011)],
    }
    found = modules["media_sharing"].known_summary(values)
    added = found["added_milliseconds"]
    assert added["front"]["rounds"]["image"] == pytest.approx([1.0, 3.0, 2.0])
    assert added["front"]["median"] == pytest.approx({"image": 2.0})
    assert added["engine"]["median"] == pytest.approx({"image": 1.0})
    assert found["milliseconds"]["front"]["median"]["text"] == pytest.approx(2.0)


# --- recovery --------------------------------------------------------------------------------------------------------


def test_what_a_kill_did_is_read_from_the_replies(modules: dict[str, ModuleType]) -> None:
    reply = modules["served"].Reply
    unavailable = (503, "engine_unavailable", "")
    replies = [
        reply(8.0, 9.0, 200, "", "before"),
        reply(9.5, 10.5, *unavailable),
        reply(9.6, 10.2, 200, "", "hit, and unharmed"),
        reply(10.5, 10.6, *unavailable),
        reply(11.0, 13.0, 200, "", "the first good one"),
        reply(11.5, 13.5, 200, "", "another"),
        reply(14.0, 14.1, 0, "connection_lost", ""),
    ]
    health = [(9.9, 200), (10.1, 503), (11.9, 503), (12.0, 200)]
    found = modules["media_recovery"].after_kill(replies, health, 10.0)
    assert found == {
        "good_request_seconds": 3.0,
        "healthy_seconds": pytest.approx(1.9),
        "hit": {"503 engine_unavailable": 1, "200": 1},
        "meanwhile": {"503 engine_unavailable": 1},
        "failed_later": 1,
    }


def test_a_server_that_does_not_recover_has_no_seconds(modules: dict[str, ModuleType]) -> None:
    reply = modules["served"].Reply
    replies = [
        reply(9.0, 11.0, 0, "connection_lost", ""),
        reply(12.0, 12.1, 0, "connection_lost", ""),
    ]
    found = modules["media_recovery"].after_kill(replies, [(9.0, 200), (12.0, 0)], 10.0)
    assert found["good_request_seconds"] is None
    assert found["healthy_seconds"] is None
    assert found["meanwhile"] == {"0 connection_lost": 1}
    rows = modules["media_report"].recovery_rows({"engine": [found]})
    assert [row.missed for row in rows] == [True, True, False]


# --- the report ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "least", "most", "wanted", "missed"),
    [
        (5.0, None, None, "", False),
        (None, None, None, "", False),
        (1.6, 1.6, None, "at least 1.6", False),
        (1.5, 1.6, None, "at least 1.6", True),
        (1.0, None, 1.0, "at most 1", False),
        (1.1, None, 1.0, "at most 1", True),
        (2, 1, 1, "1", True),
        (0, 1, 1, "1", True),
        (1, 1, 1, "1", False),
        (None, None, 1.0, "at most 1", True),
    ],
)
def test_targets(
    modules: dict[str, ModuleType],
    value: float | None,
    least: float | None,
    most: float | None,
    wanted: str,
    missed: bool,
) -> None:
    row = modules["media_report"].Row("s", "n", value, "", least, most)
    assert (row.wanted, row.missed) == (wanted, missed)


def missed(rows: list[Any]) -> list[str]:
    return [row.name for row in rows if row.missed]


def once_run(**over: Any) -> dict[str, Any]:
    counters = dict.fromkeys(
        (
            "media_stage_items/fetch",
            "media_stage_items/decode",
            "media_stage_items/preprocess",
            "mm_encoder_items",
        ),
        1,
    )
    run = {
        "delay_seconds": 0.0,
        "fetches_seen_by_host": 1,
        "counters": counters,
        "statuses": {"200": 100},
        "different_answers": 1,
        "seconds": 0.5,
    }
    return {**run, **over}


def test_one_url_must_cost_one_of_each(modules: dict[str, ModuleType]) -> None:
    rows_of = modules["media_report"].once_rows
    good = [once_run(), once_run(delay_seconds=0.3)]
    assert missed(rows_of(good)) == []
    twice = {**once_run()["counters"], "mm_encoder_items": 2}
    bad = once_run(fetches_seen_by_host=3, counters=twice, statuses={"200": 98, "503": 2})
    assert missed(rows_of([*good, bad])) == [
        "host answers after 0 ms: fetches by its log",
        "host answers after 0 ms: mm_encoder_items",
        "host answers after 0 ms: requests refused",
    ]
    unknown = {**once_run()["counters"], "media_stage_items/decode": None}
    assert missed(rows_of([once_run(counters=unknown), good[1]])) == [
        "host answers after 0 ms: media_stage_items/decode"
    ]


def test_a_known_image_must_be_cheap_and_move_nothing(modules: dict[str, ModuleType]) -> None:
    def found(image: float, decoded: float | None) -> dict[str, Any]:
        return {
            "added_milliseconds": {
                "front": {"median": {"image": image, "uuid": 0.2, "again": 0.1}}
            },
            "milliseconds": {"front": {"median": {"text": 2.0}}},
            "work": {"image": {"decode": decoded}, "uuid": {"decode": 0.0}},
        }

    rows_of = modules["media_report"].cached_rows
    assert missed(rows_of(found(0.9, 0.0))) == []
    assert missed(rows_of(found(1.2, 0.0))) == ["a known image adds"]
    assert missed(rows_of(found(0.9, 1.0))) == ["items and bytes decoded … encoded"]
    assert missed(rows_of(found(0.9, None))) == ["items and bytes decoded … encoded"]
    without = found(0.9, 0.0)
    del without["added_milliseconds"]["front"]["median"]["uuid"], without["work"]["uuid"]
    assert missed(rows_of(without)) == ["a uuid adds", "items and bytes decoded … encoded"]


def test_load_and_preprocessing_have_their_targets(modules: dict[str, ModuleType]) -> None:
    phase = {
        "loop_lag_seconds": {"p99": 0.0075},
        "health_seconds": {"p50": 0.001, "p99": 0.002},
        "text_first_token_seconds": None,
    }
    loaded = {**phase, "statuses": {"200": 9, "503": 1}, "images_per_second": 3.0}
    rows = modules["media_report"].load_rows({"at_rest": phase, "under_load": loaded})
    assert missed(rows) == ["pictures refused"]
    slow = {**loaded, "loop_lag_seconds": {"p99": None}, "statuses": {"200": 10}}
    rows = modules["media_report"].load_rows({"at_rest": phase, "under_load": slow})
    assert missed(rows) == ["loop's lag under load, p99 (at most)"]
    families = {"a": {"images_per_second": {"1": 10.0, "2": 15.0}, "ratio": 1.5}}
    assert missed(modules["media_report"].preprocess_rows(families, 1.6)) == ["a, ratio"]


def test_a_section_that_fails_does_not_take_the_others_along(
    modules: dict[str, ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    media = modules["media"]

    def fail(options: argparse.Namespace, scale: Any) -> Any:
        raise OSError("no")

    def slow(options: argparse.Namespace, scale: Any) -> Any:
        return media.Section(
            {"raw": [1, 2]}, [modules["media_report"].Row("slow", "a figure", 2.0, "s", most=1.0)]
        )

    monkeypatch.setattr(media, "SECTIONS", {"fails": fail, "slow": slow})
    output = tmp_path / "media.json"
    monkeypatch.setattr(
        sys, "argv", ["media.py", "--logs", str(tmp_path / "logs"), "--output", str(output)]
    )
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert media.main() == 1
    finally:
        signal.signal(signal.SIGTERM, handler)
    printed = capsys.readouterr().out
    assert printed.endswith(
        "missed:\n  fails failed: OSError\n  slow, a figure: 2.0 s (wanted at most 1)\n"
    )
    report = json.loads(output.read_text())
    assert report["sections"] == {"fails": {"failed": "OSError"}, "slow": {"raw": [1, 2]}}
    assert report["missed"] == ["fails failed: OSError", "slow, a figure: 2.0 s (wanted at most 1)"]
    assert [target["missed"] for target in report["targets"]] == [True]


def test_peers_are_left_out_without_one(modules: dict[str, ModuleType]) -> None:
    media = modules["media"]
    section = media.run_peers(media.parse_arguments(["--sections", "peers"]), media.QUICK)
    assert section.rows == []
    assert "--vllm-python" in section.found["left_out"]


# --- beside vLLM -----------------------------------------------------------------------------------------------------


def settings(peers: ModuleType, tmp_path: Path) -> Any:
    return peers.Settings(
        checkpoint=tmp_path / "model",
        vllm_python=tmp_path / "bin" / "python",
        folder=tmp_path,
        max_pixels=50_176,
        num_threads=2,
        rounds=1,
        num_clients=2,
        load_seconds=1.0,
        image_size=(64, 64),
        url_requests=2,
        pairs=1,
        known_requests=1,
        known_rounds=1,
    )


def test_both_servers_get_the_same_flags(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    peers = modules["media_peers"]
    chosen = settings(peers, tmp_path)
    flags = {}
    for name in (peers.OURS, peers.VLLM):
        command = chosen.command(peers.EngineKind(name, Path("/env/bin/python")), 8123)
        words = command[command.index("--host") :]
        flags[name] = dict(zip(words[::2], words[1::2], strict=True))
    ours, theirs = flags[peers.OURS], flags[peers.VLLM]
    assert theirs.items() <= ours.items()
    assert set(ours) - set(theirs) == {"--num-threads", "--kv-cache-memory-bytes"}
    assert json.loads(ours["--mm-processor-kwargs"]) == {"max_pixels": 50_176}


def test_figures_of_both_are_compared(modules: dict[str, ModuleType]) -> None:
    peers = modules["media_peers"]
    figures = peers.Figures()
    for name, fetches, rate in ((peers.OURS, 1, 4.0), (peers.VLLM, 100, 5.0)):
        run = once_run(fetches_seen_by_host=fetches)
        if name == peers.VLLM:
            run["counters"] = dict.fromkeys(run["counters"])
        peers._note_urls(figures, name, [run])
        load = {
            "images_per_second": rate,
            "statuses": {"200": 3} if name == peers.OURS else {"200": 3, "500": 1},
            "image_seconds": {"count": 0},
            "health_seconds": {"count": 1, "p50": 0.1, "p99": 0.1, "maximum": 0.1},
            "text_first_token_seconds": {"count": 0},
        }
        peers._note_load(figures, name, "new", load)
    found = {"figures": {name: series.summary() for name, series in figures.series.items()}}
    assert found["figures"]["one_url_fetches_fast"]["ours_over"] == {peers.VLLM: 0.01}
    assert peers.behind(found) == {"new_images_per_second": 0.8}
    assert list(figures.not_told) == [peers.VLLM]
    assert "mm_encoder_items" in figures.not_told[peers.VLLM]
    assert figures.failures == ["vllm, load of new images: {'200': 3, '500': 1}"]


def test_clients_of_the_recovery_load_never_repeat_an_image(modules: dict[str, ModuleType]) -> None:
    async def bodies() -> list[bytes]:
        load = modules["media_recovery"].Load(None, "m")
        return [load._body(number) for number in range(3)]

    made = asyncio.run(bodies())
    assert len(set(made)) == 3
