"""The page at ``/``: its files, its headers, its facts."""

from __future__ import annotations

import gzip
import re

import pytest

from sensorium.server.playground.assets import FOLDER, load_assets
from tests.server.fake_frontend import FakeFrontend
from tests.server.harness import App

LINK = re.compile(r'(?:href|src)="(/[^"]+)"')


async def test_all_that_the_page_names_is_served_for_ever() -> None:
    app = App()
    page = (await app.get("/")).body.decode()
    paths = LINK.findall(page)
    assert len(paths) > 20
    for path in paths:
        answer = await app.get(path, {"accept-encoding": "gzip"})
        assert answer.status == 200, path
        assert "immutable" in answer.headers["cache-control"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-encoding"] == "gzip"
        plain = await app.get(path)
        assert "content-encoding" not in plain.headers
        assert plain.body == gzip.decompress(answer.body)
    modules = {path for path in paths if path.endswith(".js")}
    assert len(modules) == len(list(FOLDER.rglob("*.js")))


async def test_modules_import_files_that_exist() -> None:
    for path in FOLDER.rglob("*.js"):
        for name in re.findall(r'from "(\.[^"]+)"', path.read_text()):
            assert (path.parent / name).is_file(), f"{path.name} imports {name}"


async def test_the_policy_allows_nothing_from_elsewhere_and_nothing_inline() -> None:
    answer = await App().get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "require-trusted-types-for 'script'" in policy
    assert not re.search(r"https?:|\*", policy)
    assert not re.search(r"<style|<script(?![^>]*src=)|\son\w+=|\sstyle=", answer.body.decode())


async def test_no_file_turns_text_into_markup_or_code() -> None:
    sinks = (
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function|srcdoc|DOMParser"
    )
    for path in FOLDER.rglob("*.js"):
        assert not re.search(sinks, path.read_text()), path


async def test_a_known_page_is_not_sent_again() -> None:
    app = App()
    first = await app.get("/")
    again = await app.get("/", {"if-none-match": first.headers["etag"]})
    assert (again.status, again.body) == (304, b"")
    assert again.headers["content-security-policy"] == first.headers["content-security-policy"]
    assert (await app.get("/", {"if-none-match": '"other"'})).status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/playground/0123456789abcdef/js/main.js",
        f"/playground/{load_assets().digest}/js/none.js",
        f"/playground/{load_assets().digest}/index.html",
        f"/playground/{load_assets().digest}/../../../app.py",
        f"/playground/{load_assets().digest}/..%2froutes.py",
        "/playground/",
    ],
)
async def test_other_files_are_not_there(path: str) -> None:
    answer = await App().get(path)
    assert (answer.status, answer.error["code"]) == (404, "not_found")


async def test_page_and_files_need_no_key_and_say_nothing_of_the_server() -> None:
    app = App(FakeFrontend(model_name="secret-model"), api_key=("right",))
    page = await app.get("/")
    assert page.status == 200
    assert b"secret-model" not in page.body
    for path in LINK.findall(page.body.decode()):
        assert (await app.get(path)).status == 200
    assert (await app.get("/playground/facts")).status == 401
    assert (await app.get("/playground/0123456789abcdef/js/main.js")).status == 401
    facts = await app.get("/playground/facts", {"authorization": "Bearer right"})
    assert facts.json()["model"] == "secret-model"


async def test_facts() -> None:
    frontend = FakeFrontend(modalities=("image", "video"), default_params={"temperature": 0.5})
    facts = (await App(frontend, served_model_name=("a", "b")).get("/playground/facts")).json()
    assert facts["model"] == "a"
    assert facts["modalities"] == ["text", "image", "video"]
    assert facts["runner"] == "generate"
    assert facts["sampling"] == {"temperature": 0.5}
    assert facts["max_model_len"] == 4096
    assert facts["metrics_prefix"] == "sensorium:"


async def test_below_a_prefix() -> None:
    app = App(root_path="/llm")
    page = (await app.get("/llm/")).body.decode()
    paths = LINK.findall(page)
    assert all(path.startswith("/llm/playground/") for path in paths)
    assert (await app.get(paths[0])).status == 200


async def test_a_page_below_another_prefix_is_another_page() -> None:
    tags = {(await App(root_path=path).get("/")).headers["etag"] for path in ("", "/a", "/b")}
    assert len(tags) == 3


async def test_a_prefix_stays_text_in_the_page() -> None:
    page = (await App(root_path='/"><b>').get("/")).body.decode()
    assert "<b>" not in page


async def test_a_server_without_the_page() -> None:
    app = App(playground=False, api_key=("right",))
    headers = {"authorization": "Bearer right"}
    for path in ("/", "/playground/facts", load_assets().address("js/main.js")):
        assert (await app.get(path)).status == 401
        assert (await app.get(path, headers)).status == 404
