import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from sensorium.config import MediaConfig
from sensorium.errors import ConfigError, MediaRefusedError, MediaTooLargeError
from sensorium.multimodal.fetch.guard import Guard, normal_host
from sensorium.multimodal.fetch.resolver import GuardedResolver
from tests.multimodal.support import FakeResolver

REFUSED = [
    "http://127.0.0.1/",
    "http://127.1/",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0x7f.0.0.1/",
    "http://0177.0.0.1/",
    "http://017700000001/",
    "http://127.0.0.1./",
    "http://①②⑦.⓪.⓪.①/",
    "http://127。0。0。1/",
    "http://0/",
    "http://0.0.0.0/",
    "http://10.0.0.8/",
    "http://169.254.169.254/latest/meta-data/",
    "http://100.64.0.1/",
    "http://[::1]/",
    "http://[::]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[::127.0.0.1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[2002:7f00:1::]/",
    "http://[2001:0:53aa:64c:0:0:80ff:fffe]/",
    "http://[fe80::1]/",
    "http://[fe80::1%25eth0]/",
    "http://[fe80::1%eth0]/",
    "http://[fd00:ec2::254]/",
    "http://[0:0:0:0:0:ffff:127.0.0.1]/",
    "http://[v1.localhost]/",
    "http://user@example.com/",
    "http://user:pass@example.com/",
    "http://@example.com/",
    "http://:@example.com/",
    "http://example.com\\@127.0.0.1/",
    "http://127.0.0.1\\@example.com/",
    "http://example.com/\\x",
    "http://example.com/\r\nHost: a",
    "http://example.com/\x00",
    "http://exam\tple.com/",
    "http://example.com/\x7f",
    "http://example.com/\x85",
    " http://example.com/",
    "http://example.com/ ",
    "http://example%2ecom/",
    "http://127.0.0.1%2f@example.com/",
    "http:///x",
    "http://",
    "http:example.com/",
    "http://example.com:0/",
    "http://example.com:99999/",
    "http://example.com:port/",
    "http://example.com:８０/",
    "http://example.com:8_0/",
    "http://example.com:+80/",
    "http://example.com:000080/",
    "http://8.8.8.8./",
    "http://[2606:4700::1111%25eth0]/",
    "http://[2606:4700::1111].example/",
    "http://127.0.0.1[2606:4700::1111]/",
    "http://[2606:4700::1111]]/",
    "http://[[2606:4700::1111]]/",
    "http://2606:4700::1111/",
    "http://a]/",
    "http://example.c℀/",
    "http://example.com／@x/",
    "http://\udc80.example/",
    "http://example.com/\udc80",
    "http://-example.com/",
    "http://exa mple.com/",
    "http://example..com/",
    "http://.example.com/",
    "ftp://example.com/x",
    "gopher://example.com/x",
    "ws://example.com/x",
    "file+http://example.com/",
    "javascript://example.com/%0a",
    "http://example.com/" + "a" * 9000,
]


@pytest.mark.parametrize("url", REFUSED)
def test_refused_urls(url: str) -> None:
    with pytest.raises(MediaRefusedError) as caught:
        Guard().check_url(url)
    assert caught.value.code == "media_refused"
    for secret in ("127.0.0.1", "169.254", "10.0.0.8", "0x"):
        assert secret not in caught.value.message


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        ("http://example.com/", "http://example.com/"),
        ("HTTPS://EXAMPLE.com./a?b=c#d", "https://example.com./a?b=c#d"),
        ("https://bücher.example/ä b.png", "https://xn--bcher-kva.example/%C3%A4%20b.png"),
        ("http://8.8.8.8:8080/x", "http://8.8.8.8:8080/x"),
        ("http://[2606:4700::1111]/x", "http://[2606:4700::1111]/x"),
        ("http://a_b.example/x?u=http://c@d/", "http://a_b.example/x?u=http://c@d/"),
    ],
)
def test_allowed_urls(url: str, seen: str) -> None:
    assert str(Guard().check_url(url)) == seen


def guard_of(*domains: str) -> Guard:
    return Guard.of(MediaConfig(allowed_media_domains=domains))


def test_only_listed_hosts_when_there_is_a_list() -> None:
    guard = guard_of("Example.COM", "bücher.example", "127.0.0.1", "[::1]", "intern.")
    for url in (
        "http://example.com/",
        "http://EXAMPLE.com.:81/",
        "http://xn--bcher-kva.example/",
        "http://127.0.0.1:5/",
        "http://[0:0::1]/",
        "http://intern/",
    ):
        guard.check_url(url)
    for url in (
        "http://sub.example.com/",
        "http://example.com.evil.test/",
        "http://evilexample.com/",
        "http://127.0.0.2/",
        "http://127.1/",
        "http://8.8.8.8/",
        "http://example.com\\@evil/",
    ):
        with pytest.raises(MediaRefusedError):
            guard.check_url(url)


@pytest.mark.parametrize(
    "domain", ["http://a.example", "a.example/x", "a.example:80", "*.example", "", "127.1"]
)
def test_domains_that_are_no_hosts_fail_at_start(domain: str) -> None:
    with pytest.raises(ConfigError):
        guard_of(domain)


def test_hops_are_checked_like_first_urls() -> None:
    for url in ("ftp://example.com/", "http://u:p@example.com/", "http://10.1.2.3/"):
        with pytest.raises(MediaRefusedError):
            Guard().check_hop(URL(url))


async def test_all_addresses_of_a_name_are_checked() -> None:
    answers = {
        "good.example": [["8.8.8.8", "2606:4700::1111"]],
        "mixed.example": [["8.8.8.8", "127.0.0.1"]],
        "scoped.example": [["fe80::1%2"]],
        "none.example": [[]],
    }
    resolver = GuardedResolver(Guard(), FakeResolver(answers))
    found = await resolver.resolve("good.example", 80, socket.AF_UNSPEC)
    assert [entry["host"] for entry in found] == ["8.8.8.8", "2606:4700::1111"]
    for name in ("mixed.example", "scoped.example", "none.example"):
        with pytest.raises(MediaRefusedError) as caught:
            await resolver.resolve(name, 80, socket.AF_UNSPEC)
        assert "127" not in caught.value.message
    listed = GuardedResolver(guard_of("mixed.example"), FakeResolver(answers))
    assert len(await listed.resolve("mixed.example")) == 2


async def test_a_name_that_changes_its_mind_is_checked_each_time() -> None:
    resolver = GuardedResolver(Guard(), FakeResolver({"r.example": [["8.8.8.8"], ["127.0.0.1"]]}))
    assert await resolver.resolve("r.example")
    with pytest.raises(MediaRefusedError):
        await resolver.resolve("r.example")


@given(st.text(max_size=60))
def test_any_text_is_checked_or_refused(text: str) -> None:
    for url in (text, f"http://{text}", f"http://example.com/{text}"):
        try:
            checked = Guard().check_url(url)
        except MediaRefusedError:
            continue
        assert checked.scheme in ("http", "https")
        assert checked.raw_host == checked.raw_host.lower()
        assert not checked.user
        assert normal_host(checked.raw_host)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "media"
    (root / "sub").mkdir(parents=True)
    (root / "a.bin").write_bytes(b"inside")
    (root / "sub" / "ä b.bin").write_bytes(b"deep")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "media2").mkdir()
    (tmp_path / "media2" / "x").write_bytes(b"sibling")
    return root


def local_guard(root) -> Guard:
    return Guard.of(MediaConfig(allowed_local_media_path=str(root)))


def test_local_files_below_the_folder_are_read(folder) -> None:
    guard = local_guard(folder)
    (folder / "link").symlink_to(folder / "a.bin")
    (folder / "sublink").symlink_to(folder / "sub")
    for text, content in (
        (f"{folder}/a.bin", b"inside"),
        (f"file://{folder}/a.bin", b"inside"),
        (f"file://localhost{folder}/a.bin", b"inside"),
        (f"file:{folder}/a.bin", b"inside"),
        (f"FILE://{folder}/sub/%C3%A4%20b.bin", b"deep"),
        (f"{folder}/sub/../a.bin", b"inside"),
        (f"{folder}/link", b"inside"),
        (f"{folder}/sublink/ä b.bin", b"deep"),
    ):
        assert guard.read_local(text, 100) == content


def test_nothing_else_is_read(folder) -> None:
    (folder / "out").symlink_to(folder.parent / "secret")
    (folder / "outdir").symlink_to(folder.parent)
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "fifo")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    guard = local_guard(folder)
    for text in (
        f"{folder}/../secret",
        f"file://{folder}/../secret",
        f"file://{folder}/%2e%2e/secret",
        f"file://{folder}/..%2fsecret",
        f"file://{folder}/%2E%2E%2Fsecret",
        f"{folder}/%2e%2e/secret",
        f"{folder}/out",
        f"{folder}/outdir/secret",
        f"{folder}2/x",
        f"{folder}",
        f"{folder}/",
        f"{folder}/sub",
        f"{folder}/fifo",
        f"{folder}/socket",
        f"{folder}/loop",
        f"{folder}/missing",
        f"{folder}/a.bin/x",
        f"{folder}/a.bin\0.png",
        f"file://{folder}/a.bin%00.png",
        f"file://otherhost{folder}/a.bin",
        "file:",
        "file://",
        "",
        "/etc/passwd",
        "file:///etc/passwd",
        "/dev/zero",
        "/proc/self/environ",
        "a.bin",
        "\udfff\ud800",
    ):
        with pytest.raises(MediaRefusedError) as caught:
            guard.read_local(text, 100)
        assert str(folder.parent) not in caught.value.message
    listener.close()


def test_a_link_put_in_place_after_the_check_is_not_followed(folder, monkeypatch) -> None:
    guard = local_guard(folder)
    real = os.path.realpath(folder / "sub" / "ä b.bin")
    (folder / "sub").rename(folder / "old")
    (folder / "sub").symlink_to(folder / "old")
    monkeypatch.setattr(os.path, "realpath", lambda path: real)
    with pytest.raises(MediaRefusedError):
        guard.read_local(real, 100)


def test_a_large_file_is_refused_before_it_is_read(folder) -> None:
    with open(folder / "large", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(MediaTooLargeError, match=str(1 << 40)):
        local_guard(folder).read_local(f"{folder}/large", 1 << 50 >> 11)


def test_files_of_the_kernel_give_nothing() -> None:
    guard = Guard(local_root="/")
    for text in ("/proc/self/environ", "file:///proc/self/environ", "/proc/self/mem"):
        try:
            assert guard.read_local(text, 1 << 20) == b""
        except MediaRefusedError:
            continue
    for text in ("/dev/zero", "/dev/null", "/dev/stdin"):
        with pytest.raises(MediaRefusedError):
            guard.read_local(text, 1 << 20)


def test_paths_have_an_end(folder) -> None:
    for text in (f"{folder}/{'a/' * 5000}", f"file://{folder}/{'../a/' * 5000}"):
        with pytest.raises(MediaRefusedError, match="8192"):
            local_guard(folder).read_local(text, 100)
    with pytest.raises(MediaRefusedError):
        local_guard(folder).read_local(f"{folder}/{'a' * 4000}", 100)


def test_local_files_are_off_by_default_and_bounded(folder) -> None:
    with pytest.raises(MediaRefusedError, match="--allowed-local-media-path"):
        Guard().read_local(str(folder / "a.bin"), 100)
    assert local_guard(folder).read_local(str(folder / "a.bin"), 6) == b"inside"
    with pytest.raises(MediaTooLargeError):
        local_guard(folder).read_local(str(folder / "a.bin"), 5)


def test_the_folder_must_exist(tmp_path) -> None:
    with pytest.raises(ConfigError):
        local_guard(tmp_path / "missing")


def test_the_folder_may_be_a_link_itself(folder) -> None:
    link = folder.parent / "alias"
    link.symlink_to(folder)
    assert local_guard(link).read_local(str(link / "a.bin"), 100) == b"inside"
