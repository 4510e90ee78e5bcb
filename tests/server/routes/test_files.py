"""``/v1/files`` through the application, with a front end that does not generate."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.server.harness import Answer, App, running, status_of, until

BOUNDARY = "----a-boundary"
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    file = "" if filename is None else f'; filename="{filename}"'
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
    return head.encode() + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


async def upload(
    app: App,
    content: bytes = b"hello",
    *,
    name: str = "a.txt",
    fields: dict[str, str] | None = None,
    headers: dict[str, str] | None = None,
) -> Answer:
    given = {"purpose": "user_data"} if fields is None else fields
    parts = [part(key, value.encode()) for key, value in given.items()]
    body = form(part("file", content, name), *parts)
    pieces = [body[i : i + 1000] for i in range(0, len(body), 1000)]
    return await app.request("POST", "/v1/files", pieces, {**FORM, **(headers or {})})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def app(folder: Path) -> Any:
    app = App(file_folder=str(folder), max_file_bytes=5000, max_stored_file_bytes=9000)
    yield app
    app.app.state.context.files.close()


async def test_a_file_is_kept_shown_and_deleted(app: App, folder: Path) -> None:
    content = bytes(range(256)) * 10
    answer = await upload(app, content, name="report.pdf")
    assert answer.status == 200
    file = answer.json()
    assert file["object"] == "file"
    assert file["bytes"] == len(content)
    assert file["filename"] == "report.pdf"
    assert file["purpose"] == "user_data"
    assert file["expires_at"] == file["created_at"] + 86400
    path = f"/v1/files/{file['id']}"
    assert (await app.get(path)).json() == file
    got = await app.get(f"{path}/content")
    assert got.body == content
    assert got.headers["content-length"] == str(len(content))
    assert got.headers["content-type"] == "application/octet-stream"
    assert got.headers["x-content-type-options"] == "nosniff"
    assert [p.name for p in folder.glob("*/file-*")] == [file["id"]]
    gone = await app.request("DELETE", path)
    assert gone.json() == {"id": file["id"], "object": "file", "deleted": True}
    assert not list(folder.glob("*/file-*"))
    for method, way in (("GET", path), ("GET", f"{path}/content"), ("DELETE", path)):
        answer = await app.request(method, way)
        assert answer.status == 404
        assert answer.error["code"] == "not_found"


async def test_lists_have_pages(app: App) -> None:
    ids = [(await upload(app, name=f"{i}")).json()["id"] for i in range(5)]
    other = (await upload(app, fields={"purpose": "batch"})).json()["id"]
    listed = (await app.get("/v1/files")).json()
    assert [f["id"] for f in listed["data"]] == [other, *reversed(ids)]
    assert not listed["has_more"]
    first = (await app.get("/v1/files?order=asc&limit=2&purpose=user_data")).json()
    assert [f["id"] for f in first["data"]] == ids[:2]
    assert first["has_more"]
    assert first["last_id"] == ids[1]
    rest = (await app.get(f"/v1/files?order=asc&after={ids[1]}&purpose=user_data")).json()
    assert [f["id"] for f in rest["data"]] == ids[2:]


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=x", "limit=10001", "order=up", "after=file-1", "befor=1"]
)
async def test_wrong_queries_are_refused(app: App, query: str) -> None:
    answer = await app.get(f"/v1/files?{query}")
    assert answer.status == 400
    assert answer.error["param"] == query.partition("=")[0]


@pytest.mark.parametrize(("keys", "most"), [((), 3000), (("ada", "ben"), 1500)])
async def test_a_file_larger_than_all_that_may_be_stored_is_too_large(
    folder: Path, keys: tuple[str, ...], most: int
) -> None:
    app = App(file_folder=str(folder), max_stored_file_bytes=3000, api_key=keys)
    headers = {"authorization": "Bearer ada"}
    answer = await upload(app, bytes(most + 1), headers=headers)
    assert (answer.status, answer.error["code"]) == (413, "media_too_large")
    assert f"{most} bytes, the limit (--max-stored-file-bytes)" in answer.error["message"]
    assert (await upload(app, bytes(most), headers=headers)).status == 200
    assert (await upload(app, b"x", headers=headers)).status == 503
    app.app.state.context.files.close()


async def test_a_tenant_sees_only_its_own(folder: Path) -> None:
    app = App(file_folder=str(folder), api_key=("ada", "ben"))
    ada, ben = ({"authorization": f"Bearer {name}"} for name in ("ada", "ben"))
    file = (await upload(app, headers=ada)).json()["id"]
    assert (await app.get(f"/v1/files/{file}", ada)).status == 200
    for way in (f"/v1/files/{file}", f"/v1/files/{file}/content"):
        assert (await app.get(way, ben)).error["code"] == "not_found"
    assert (await app.request("DELETE", f"/v1/files/{file}", headers=ben)).status == 404
    assert (await app.get("/v1/files", ben)).json()["data"] == []
    assert (await app.get(f"/v1/files/{file}")).status == 401
    part = {"type": "file", "file": {"file_id": file}}
    asked = {"messages": [{"role": "user", "content": [part]}]}
    answer = await app.post("/v1/chat/completions", asked, ben)
    assert answer.status == 404
    assert answer.error["param"] == "messages[0].content[0].file.file_id"
    app.app.state.context.files.close()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\\\Users\\\\x.pdf", "x.pdf"),
        ("..", "upload"),
        ("", "upload"),
        ("a\tb\u202e.pdf", "ab.pdf"),
        ("x" * 3000 + ".pdf", "x" * 251 + ".pdf"),
        ("naïve 图.pdf", "naïve 图.pdf"),
    ],
)
async def test_names_are_no_paths(app: App, folder: Path, name: str, shown: str) -> None:
    file = (await upload(app, name=name)).json()
    assert file["filename"] == shown
    assert {p.name for p in folder.glob("*/*")} == {".lock", file["id"]}
    assert (await app.get(f"/v1/files/{file['id']}/content")).status == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "purpose"),
        ({"purpose": "fun"}, "purpose"),
        ({"purpose": "vision", "expires_after[seconds]": "4000"}, "expires_after[anchor]"),
        (
            {"purpose": "vision", "expires_after[anchor]": "created_at"},
            "expires_after[seconds]",
        ),
        (
            {
                "purpose": "vision",
                "expires_after[anchor]": "created_at",
                "expires_after[seconds]": "9" * 30,
            },
            "expires_after[seconds]",
        ),
        ({"purpose": "vision", "colour": "red"}, "colour"),
    ],
)
async def test_wrong_fields_leave_nothing(
    app: App, folder: Path, fields: dict[str, str], param: str
) -> None:
    answer = await upload(app, fields=fields)
    assert answer.status == 400
    assert answer.error["param"] == param
    assert not list(folder.glob("*/file-*"))
    assert app.app.state.context.files.num_bytes == 0
    assert app.app.state.context.files.num_files == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        form(part("purpose", b"vision")),
        form(part("file", b"x", "a"), part("file", b"y", "b"), part("purpose", b"vision")),
        form(part("purpose", b"vision"), part("purpose", b"batch"), part("file", b"x", "a")),
        form(part("file", b"x", "a"), part("purpose", b"vision"))[:-8],
        form(part("file", b"x", "a"), part("purpose", b"\xff\xfe")),
        form(part("file", b"x", "a"), part("purpose", b"p" * 70_000)),
        form(*(part(f"f{i}", b"") for i in range(40)), part("file", b"x", "a")),
        f"--{BOUNDARY}\r\nX: {'y' * 70_000}\r\n\r\nx\r\n--{BOUNDARY}--".encode(),
        f"--{BOUNDARY}\r\n\r\nx\r\n--{BOUNDARY}--\r\n".encode(),
    ],
    ids=range(11),
)
async def test_wrong_forms_leave_nothing(app: App, folder: Path, body: bytes) -> None:
    pieces = [body[i : i + 777] for i in range(0, len(body), 777)] or [b""]
    answer = await app.request("POST", "/v1/files", pieces, FORM)
    assert answer.status == 400, answer.body
    assert answer.error["code"] == "invalid_request"
    assert not list(folder.glob("*/file-*"))
    assert app.app.state.context.files.num_files == 0


async def test_another_content_type_is_refused(app: App) -> None:
    answer = await app.post("/v1/files", {"purpose": "vision"})
    assert answer.status == 400
    assert "multipart/form-data" in answer.error["message"]


async def test_bytes_and_number_are_bounded(folder: Path) -> None:
    app = App(
        file_folder=str(folder), max_file_bytes=5000, max_stored_file_bytes=9000, max_stored_files=3
    )
    store = app.app.state.context.files
    large = await upload(app, b"x" * 5001)
    assert (large.status, large.error["code"]) == (413, "media_too_large")
    assert "5000" in large.error["message"]
    assert store.num_bytes == store.num_files == 0
    assert (await upload(app, b"x" * 5000)).status == 200
    full = await upload(app, b"x" * 4001)
    assert (full.status, full.error["code"]) == (503, "overloaded")
    assert "--max-stored-file-bytes" in full.error["message"]
    assert store.num_bytes == 5000
    for _ in range(2):
        assert (await upload(app, b"x")).status == 200
    many = await upload(app, b"x")
    assert (many.status, many.error["code"]) == (503, "overloaded")
    assert "--max-stored-files" in many.error["message"]
    assert len(list(folder.glob("*/file-*"))) == 3
    store.close()
    assert not list(folder.iterdir())


async def test_a_body_beyond_all_limits_is_refused_by_its_size(app: App) -> None:
    head = {**FORM, "content-length": str(1 << 40)}
    answer = await app.request("POST", "/v1/files", [b""], head)
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")


async def test_files_expire(app: App, folder: Path) -> None:
    now = 1000.0
    store = app.app.state.context.files
    store.clock = lambda: now
    first = (await upload(app)).json()
    assert first["expires_at"] == 1000 + 86400
    now += 86399
    assert (await app.get(f"/v1/files/{first['id']}")).status == 200
    now += 1
    assert (await app.get(f"/v1/files/{first['id']}")).status == 404
    assert (await app.get("/v1/files")).json()["data"] == []
    await until(lambda: not list(folder.glob("*/file-*")))
    assert store.num_bytes == 0


async def test_an_age_may_be_shorter(app: App) -> None:
    fields = {
        "purpose": "batch",
        "expires_after[anchor]": "created_at",
        "expires_after[seconds]": "3600",
    }
    file = (await upload(app, fields=fields)).json()
    assert file["expires_at"] - file["created_at"] == 3600


async def test_a_client_that_leaves_leaves_nothing(folder: Path) -> None:
    async with running(file_folder=str(folder)) as server:
        store = server.app.state.context.files
        _, writer = await server.connect()
        writer.write(
            f"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM['content-type']}\r\n"
            "Content-Length: 1000000\r\n\r\n".encode()
            + part("file", b"x" * 3000, "a")[:-2]
        )
        await writer.drain()
        await until(lambda: store.num_bytes > 0)
        writer.close()
        await until(lambda: store.num_files == 0)
        assert store.num_bytes == 0
        assert not list(folder.glob("*/file-*"))
    assert not list(folder.iterdir())


async def test_uploads_end_when_the_server_stops(folder: Path) -> None:
    async with running(file_folder=str(folder)) as server:
        reader, writer = await server.connect()
        writer.write(
            f"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM['content-type']}\r\n"
            "Content-Length: 1000000\r\n\r\n".encode()
            + part("file", b"x" * 3000, "a")[:-2]
        )
        await writer.drain()
        await until(lambda: server.app.state.context.files.num_bytes > 0)
        server.signals.on_signal()
        assert await status_of(reader) == 503
        writer.close()
    assert not list(folder.iterdir())


async def test_the_description_has_the_form(app: App) -> None:
    described = json.loads((await app.get("/openapi.json")).body)["paths"]
    content = described["/v1/files"]["post"]["requestBody"]["content"]
    assert list(content) == ["multipart/form-data"]
    assert {p["name"] for p in described["/v1/files"]["get"]["parameters"]} == {
        *("after", "limit", "order", "purpose"),
    }
    await asyncio.sleep(0)
