"""URLs that lead where a client has no business: nothing is connected to, whatever the spelling."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sensorium
from tests.reliability.asking import Offline, Service, audio, image, place, text, video
from tests.reliability.listeners import Host, Internet
from tests.reliability.media import encoded, picture

PUBLIC = "93.184.216.34"
LOOPBACK = (
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "2130706433",
    "0x7f000001",
    "0x7f.0.0.1",
    "017700000001",
    "0177.0.0.01",
    "0",
    "0.0.0.0",
    "127.0.0.1.",
    "localhost",
    "LocalHost",
    "ⓛocalhost",
    "①②⑦.⓪.⓪.①",
    "127。0。0。1",
    "[::1]",
    "[::]",
    "[0:0:0:0:0:0:0:1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]",
    "[::1%25lo]",
    "user@127.0.0.1",
    "user:secret@localhost",
    "example.com@127.0.0.1",
)
"""Names of this machine, as a client may write them."""
INSIDE = (
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "2852039166",
    "[::ffff:169.254.169.254]",
    "100.64.0.1",
    "168.63.129.16",
    "224.0.0.1",
    "255.255.255.255",
    "[fd00:ec2::254]",
    "[fe80::1]",
    "[ff02::1]",
)
"""Addresses of other machines that are nobody's business."""


@pytest.mark.parametrize("name", LOOPBACK)
def test_this_machine_is_not_fetched_from_by_default(
    closed: Service, trap: Host, name: str
) -> None:
    """CVE-2025-6242: a media URL of the server's own network was fetched.

    The listener sees no connection.
    """
    part = audio(f"http://{name}:{trap.port}/x.wav")
    closed.ask(part).is_refusal(400, "media_refused", place(part))


@pytest.mark.parametrize("name", [*LOOPBACK, *INSIDE])
def test_no_inner_address_is_connected_to_offline(
    offline: Offline, internet: Internet, name: str
) -> None:
    """The same for ``LLM``: of nothing that is refused a connection is even begun."""
    for part in (image(f"http://{name}/x.png"), video(f"https://{name}/x.mp4")):
        offline.ask(part).is_refusal(400, "media_refused", place(part))
    assert internet.connected == []


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost:{port}\\@127.0.0.1:{trap}/",
        "http://127.0.0.1:{trap}\\@localhost:{port}/",
        "http://localhost\\.127.0.0.1:{trap}/",
        "http:\\\\127.0.0.1:{trap}\\x.png",
        "http:/\\127.0.0.1:{trap}/x.png",
        "http://localhost:{port}@127.0.0.1:{trap}/",
        "http://127.0.0.1:{trap}#@localhost:{port}/",
        "http://127.0.0.1:{trap}?@localhost:{port}/",
        "http://127.0.0.1:{trap};localhost/",
        "http://localhost%00.127.0.0.1:{trap}/",
        "http://localhost%2f@127.0.0.1:{trap}/",
        "http://localhost\t@127.0.0.1:{trap}/",
        "http://127.0.0.1:{trap}/\r\nHost: localhost",
        " http://127.0.0.1:{trap}/",
        "http:127.0.0.1:{trap}/",
        "http:///127.0.0.1:{trap}/",
        "http://[localhost]@127.0.0.1:{trap}/",
        "http://[::1]localhost:{trap}/",
        "http://127.0.0.1:{trap}",
        "HTTP://127.0.0.1:{trap}/",
        "http://sub.localhost:{trap}/",
        "http://localhost.example:{trap}/",
    ],
)
@pytest.mark.parametrize("kind", [image, video])
def test_the_list_of_hosts_is_not_passed_by(
    served: Service, media_host: Host, trap: Host, url: str, kind: object
) -> None:
    """CVE-2026-24779, CVE-2026-25960.

    Two parsers read one URL differently, and the list of hosts was checked against one and fetched
    with the other.
    """
    part = kind(url.format(port=media_host.port, trap=trap.port))  # type: ignore[operator]
    asked = list(media_host.paths)
    served.ask(part).is_refusal(400, "media_refused", place(part))
    assert media_host.paths == asked


def test_a_listed_host_is_fetched_from(served: Service, media_host: Host) -> None:
    """What the tests around this one refuse is reachable as such."""
    url = media_host.serve("/good.png", encoded(picture()))
    assert served.ask(image(url), text("What is this?")).text
    assert "/good.png" in media_host.paths


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1:{trap}/",
        "//127.0.0.1:{trap}/",
        "http://[::1]:{trap}/",
        "http://[::ffff:127.0.0.1]:{trap}/",
        "http://2130706433:{trap}/",
        "http://user@127.0.0.1:{trap}/",
        "http://127.0.0.1:{trap}\\@localhost/",
        "ftp://127.0.0.1:{trap}/",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "javascript:alert(1)",
    ],
)
def test_a_redirect_does_not_lead_inside(
    served: Service, media_host: Host, trap: Host, target: str
) -> None:
    """A host that may be fetched from sends the server to one that may not.

    Refused, without a connection.
    """
    part = image(media_host.redirect("/away", target.format(trap=trap.port)))
    served.ask(part).is_refusal(400, "media_refused", place(part))


@pytest.mark.parametrize("target", ["\\\\127.0.0.1:{trap}\\", "http:127.0.0.1:{trap}/", "/..//"])
def test_a_redirect_that_could_be_read_in_two_ways_stays_on_its_host(
    served: Service, media_host: Host, trap: Host, target: str
) -> None:
    """What a browser might take for another host is a path of the same one, or refused."""
    part = image(media_host.redirect("/odd", target.format(trap=trap.port)))
    served.ask(part).is_refusal(424, "media_fetch_failed", place(part))


@pytest.mark.parametrize("target", ["http://127.0.0.1:{trap}/", "http://inner.example:{trap}/"])
def test_a_redirect_from_a_public_host_does_not_lead_inside(
    offline: Offline, media_host: Host, trap: Host, internet: Internet, target: str
) -> None:
    """vLLM issue 57157: inner hosts reachable by default, and by a redirect of a public one.

    Each hop is resolved and checked anew.
    """
    internet.names = {"public.example": [[PUBLIC]], "inner.example": [["127.0.0.1"]]}
    internet.moved = {PUBLIC: media_host.port}
    media_host.redirect("/away", target.format(trap=trap.port))
    part = image("http://public.example/away")
    offline.ask(part).is_refusal(400, "media_refused", place(part))
    assert internet.connected == [PUBLIC]
    media_host.serve("/good.png", encoded(picture()))
    media_host.redirect("/near", "/good.png")
    assert offline.ask(image("http://public.example/near"), text("What is this?")).text


def test_a_name_that_changes_its_address(
    offline: Offline, media_host: Host, trap: Host, internet: Internet
) -> None:
    """DNS rebinding: public when asked first, private afterwards.

    The connection goes to the address that was checked, and another attempt checks anew.
    """
    internet.names = {"rebound.example": [[PUBLIC], ["127.0.0.1"]]}
    internet.moved = {PUBLIC: media_host.port}
    media_host.serve("/busy", b"", status="503 Busy")
    part = image(f"http://rebound.example:{trap.port}/busy")
    offline.ask(part).is_refusal(400, "media_refused", place(part))
    assert internet.connected == [PUBLIC]
    assert internet.questions == ["rebound.example", "rebound.example"]


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], [PUBLIC, "10.0.0.1"], ["::1"], ["::ffff:10.0.0.1"], []]
)
def test_a_name_of_inner_addresses(
    offline: Offline, internet: Internet, addresses: list[str]
) -> None:
    """One private address among public ones is enough to refuse a name."""
    internet.names = {"mixed.example": [addresses]}
    part = image("http://mixed.example/x.png")
    offline.ask(part).is_refusal(400, "media_refused", place(part))
    assert internet.connected == []


@pytest.mark.parametrize(
    "url",
    [
        "ftp://localhost/x.png",
        "gopher://localhost:6379/_FLUSHALL",
        "dict://localhost:6379/info",
        "jar:http://localhost!/x",
        "unix:///run/docker.sock",
        "blob:http://localhost/x",
        "s3://bucket/x.png",
        "javascript:alert(1)",
        "http+unix://%2frun/x",
        "x" * 9000 + "://localhost/",
    ],
)
def test_other_schemes_are_refused(served: Service, media_host: Host, url: str) -> None:
    """Only http, https, data and file; each other scheme is refused and nothing is connected to."""
    before = media_host.num_connections
    part = image(url)
    served.ask(part).is_refusal(400, "media_refused", place(part))
    assert media_host.num_connections == before


def test_links_in_texts_are_not_followed(served: Service, media_host: Host) -> None:
    """CVE-2026-0599 (TGI): pictures linked in Markdown were downloaded, without a bound."""
    before = media_host.num_connections
    url = media_host.serve("/linked.png", encoded(picture()))
    assert served.ask(text(f"![picture]({url}) <img src='{url}'> <image>{url}</image>")).text
    assert media_host.num_connections == before


@pytest.mark.parametrize(
    "url", ["/etc/hostname", "file:///etc/hostname", "./README.md", "file:/proc/self/environ"]
)
def test_local_paths_are_closed_by_default(closed: Service, url: str) -> None:
    """CVE-2026-33626 (LMDeploy) and SGLang's media loader.

    Inner hosts and local files were open unless listed.
    """
    part = audio(url)
    closed.ask(part).is_refusal(400, "media_refused", place(part))


def test_one_module_alone_downloads() -> None:
    """CVE-2026-34753: a second downloader, of a batch runner, had no guard.

    Here every download of a request goes through ``multimodal.fetch.client`` and its resolver:
    nothing else imports a client, but for the tools that call a server that their user names.
    """
    root = Path(sensorium.__file__).parent
    clients = {"aiohttp", "requests", "httpx", "urllib.request", "urllib3", "http.client"}
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            if any(name in clients or name.split(".")[0] in clients for name in names):
                found.add(str(path.relative_to(root)))
    tools = {name for name in found if name.split("/")[0] in ("bench", "cli")}
    assert found - tools == {
        "multimodal/fetch/client.py",
        "multimodal/fetch/resolver.py",
        "multimodal/fetch/fetcher.py",
    }
    fetching = (root / "multimodal" / "fetch" / "fetcher.py").read_text()
    assert "if TYPE_CHECKING:\n    from aiohttp" in fetching, "a type only"
