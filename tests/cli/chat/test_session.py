"""sensorium chat: what is read, what is sent, what is kept; and the client of a running server."""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from sensorium.cli.attachments import Attachment, add_attachment_flags, split_line, user_message
from sensorium.cli.chat.reader import LineReader
from sensorium.cli.chat.remote import RemoteModel, Thought, pieces_of
from sensorium.cli.chat.screen import Screen
from sensorium.cli.chat.session import COMMANDS, Session
from sensorium.cli.main import main
from sensorium.errors import ConfigError, SensoriumError, UnavailableError
from sensorium.text.chat.conversation import parse_messages
from tests.server.fake_frontend import FakeFrontend, fail, hang
from tests.server.harness import running, until


class Echo:
    """Says how many messages it saw; ``trouble`` is raised amid the answer."""

    name = "echo"

    def __init__(self) -> None:
        self.seen: list[list[Any]] = []
        self.sampling: Mapping[str, Any] = {}
        self.trouble: BaseException | None = None
        self.first = "part"

    def stream(
        self, messages: Sequence[Mapping[str, Any]], sampling: Mapping[str, Any]
    ) -> Iterator[str]:
        self.seen.append(list(messages))
        self.sampling = sampling
        if self.first:
            yield self.first
        if self.trouble is not None:
            raise self.trouble
        yield f" {len(messages)}"

    def close(self) -> None:
        pass


def begin(model: Echo, system: str | None = None, **sampling: Any) -> Session:
    return Session(model, sampling, reader=LineReader(), screen=Screen(), system=system)


def talk(session: Session, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    while session.turn():
        pass


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "my picture.png"
    path.write_bytes(b"\x89PNG...")
    return path


def test_the_conversation_grows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Echo()
    session = begin(model, "Be brief.", top_k=3)
    talk(session, monkeypatch, "One", "", "Two")
    assert capsys.readouterr().out == "part 2\npart 4\n"
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * 2
    assert [m["role"] for m in model.seen[1]] == ["system", "user", "assistant", "user"]
    assert session.messages[1]["content"] == "part 2"
    assert model.sampling == {"top_k": 3}


@pytest.mark.parametrize("command", ["/reset", "/clear"])
def test_clear_keeps_the_system_message(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    session = begin(Echo(), "Be brief.")
    talk(session, monkeypatch, "One", command)
    assert (session.messages, session.system) == ([], "Be brief.")


def test_the_system_message_can_be_changed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Echo()
    session = begin(model)
    talk(session, monkeypatch, "/system", "/system Be a pirate.", "Hi", '/system ""', "Hi")
    assert "There is no system message." in capsys.readouterr().out
    assert model.seen[0][0] == {"role": "system", "content": "Be a pirate."}
    assert model.seen[1][0]["role"] == "user"


def test_the_last_question_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Echo()
    session = begin(model)
    talk(session, monkeypatch, "One", "Two", "/retry")
    assert model.seen[1] == model.seen[2]
    assert len(session.messages) == 4


def test_a_retry_that_fails_keeps_the_old_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Echo()
    session = begin(model)
    talk(session, monkeypatch, "/retry", "One")
    before = list(session.messages)
    model.trouble = SensoriumError("It is too long.")
    talk(session, monkeypatch, "/retry")
    assert session.messages == before
    assert "no question to ask again" in capsys.readouterr().err


def test_save_and_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, picture: Path) -> None:
    session, file = begin(Echo(), "Be brief."), tmp_path / "chat.json"
    talk(session, monkeypatch, f"'{picture}' What?", f"/save {file}", f"/save {file}")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".png"] == ["chat.json"]
    other = begin(Echo())
    talk(other, monkeypatch, f"/load {file}", "And?")
    assert other.system == "Be brief."
    assert other.messages[:2] == session.messages
    assert len(other.messages) == 4


@pytest.mark.parametrize(
    "text",
    ["{}", "[1]", "not JSON", '{"sensorium_chat": 1, "messages": [{"role": "x"}]}', "[" * 10**5],
)
def test_other_files_are_not_loaded_and_not_overwritten(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "notes.json"
    file.write_text(text)
    session = begin(Echo())
    talk(session, monkeypatch, f"/load {file}", f"/save {file}", "/save", "/load ~no-such-user/a")
    shown = capsys.readouterr().err
    assert shown.count("is not a conversation saved by /save") == 2
    assert "/save needs the name of a file" in shown
    assert file.read_text() == text
    talk(session, monkeypatch, f"/load {tmp_path}/none", f"/save {tmp_path}/no/such/folder")
    assert capsys.readouterr().err.count("No such file") == 2


def test_a_conversation_outlives_names_that_no_file_can_have(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = begin(Echo())
    talk(session, monkeypatch, "One", f"/save {'x' * 300}", "/save a\0b", f"/save {tmp_path}")
    shown = capsys.readouterr().err
    assert "File name too long" in shown
    assert "no name of a file" in shown
    assert "Is a directory" in shown
    assert len(session.messages) == 2


def test_a_message_of_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    session = begin(Echo())
    talk(session, monkeypatch, '"""One', "", '/exit"""', "Two", '"""open')
    assert [m["content"] for m in session.messages[::2]] == ["One\n\n/exit", "Two", "open"]


def test_every_command_is_in_the_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(begin(Echo()), monkeypatch, "/help", "/nonsense")
    first, second = capsys.readouterr().out.split("/image PATH")[1:]
    assert first == second
    assert not [
        name for name in COMMANDS if name not in "/image /reset /quit" and name not in first
    ]


def test_exit_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Echo()
    talk(begin(model), monkeypatch, "/exit", "not sent")
    assert not model.seen


@pytest.mark.parametrize("how", ["/image {}", "/image '{}'"])
def test_a_picture_by_command(monkeypatch: pytest.MonkeyPatch, picture: Path, how: str) -> None:
    model = Echo()
    session = begin(model)
    talk(session, monkeypatch, how.format(picture), "What?", "And?")
    assert len(model.seen) == 2  # the command itself is no question
    first, _, second = model.seen[1]
    assert [p["type"] for p in first["content"]] == ["image_url", "text"]
    data = first["content"][0]["image_url"]["url"].removeprefix("data:image/png;base64,")
    assert base64.b64decode(data) == picture.read_bytes()
    assert second["content"] == "And?"


@pytest.mark.parametrize("how", ["'{}' What?", '"{}" What?', "What? {}", "file"])
def test_a_path_in_the_line_is_attached(how: str, picture: Path) -> None:
    escaped = str(picture).replace(" ", "\\ ")
    line = {
        "What? {}": f"What? {escaped}",
        "file": f"What? file://{str(picture).replace(' ', '%20')}",
    }.get(how, how.format(picture))
    text, attachments = split_line(line)
    assert text == "What?"
    [part, _] = user_message(text, attachments)["content"]
    assert part["image_url"]["url"].startswith("data:image/png;base64,")


@pytest.mark.parametrize(
    ("name", "modality", "media_type"),
    [
        ("a.webm", "video", "video/webm"),
        ("b.MP4", "video", "video/mp4"),
        ("c.wav", "audio", "audio/"),
    ],
)
def test_the_suffix_tells_what_a_file_is(
    tmp_path: Path, name: str, modality: str, media_type: str
) -> None:
    file = tmp_path / name
    file.write_bytes(b"data")
    [part, _] = user_message(*split_line(f"{file} What?"))["content"]
    assert part["type"] == f"{modality}_url"
    assert part[f"{modality}_url"]["url"].startswith(f"data:{media_type}")


def test_flags_and_commands_attach_each_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"data")
    parser = argparse.ArgumentParser()
    add_attachment_flags(parser, "")
    found = parser.parse_args(["--audio", "a", "--image", "b", "--audio", "c"]).attachments
    assert found == [("audio", "a"), ("image", "b"), ("audio", "c")]
    assert parser.parse_args([]).attachments == []
    echo = Echo()
    session = begin(echo)
    talk(session, monkeypatch, f"/video {file}", f"/audio {file}", f"/file {file}", "What?")
    kinds = [part["type"] for part in echo.seen[0][0]["content"]]
    assert kinds == ["video_url", "audio_url", "file", "text"]


@pytest.mark.parametrize("line", ["{} What?", "/file {}"])
def test_a_pdf_is_sent_as_a_file(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "report.PDF"
    file.write_bytes(b"%PDF-")
    echo = Echo()
    talk(begin(echo), monkeypatch, line.format(file), "What?")
    [part, _] = echo.seen[0][0]["content"]
    data = f"data:application/pdf;base64,{base64.b64encode(b'%PDF-').decode()}"
    assert part == {"type": "file", "file": {"file_data": data, "filename": "report.PDF"}}
    parse_messages([{"role": "user", "content": [part]}])


def test_a_file_at_a_url_is_fetched_by_the_engine() -> None:
    part = Attachment("file", "https://example.com/a.pdf").part()
    assert part == {"type": "file", "file": {"file_url": "https://example.com/a.pdf"}}


@pytest.mark.parametrize(
    "line",
    [
        *("it's 5 o'clock", "see /no/such.png here", 'a "quoted" word', "tail\\", "/etc/passwd"),
        *("x" * 300 + ".png", "~no-such-user/a.png"),
    ],
)
def test_other_lines_stay_as_they_are(line: str) -> None:
    assert split_line(line) == (line, [])


@pytest.mark.parametrize("source", ["x" * 300 + ".png", "~no-such-user/a.png", "a\0.png"])
def test_paths_that_no_file_can_have(source: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Attachment("image", source).part()


def test_a_wrong_path_is_told_and_forgotten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = begin(Echo())
    talk(session, monkeypatch, "/image /no/such.png", "Hi")
    shown = capsys.readouterr()
    assert "error: '/no/such.png' cannot be read" in shown.err
    assert session.messages[0]["content"] == "Hi"


def test_a_failed_question_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Echo()
    model.trouble = SensoriumError("It is too long.")
    session = begin(model)
    talk(session, monkeypatch, "One")
    assert session.messages == []
    assert "error: It is too long." in capsys.readouterr().err


def test_a_stopped_answer_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Echo()
    model.trouble = KeyboardInterrupt()
    session = begin(model)
    talk(session, monkeypatch, "One")
    assert session.messages[-1] == {"role": "assistant", "content": "part"}


def test_a_question_that_is_stopped_before_its_answer_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, picture: Path
) -> None:
    model = Echo()
    model.trouble, model.first = KeyboardInterrupt(), ""
    session = begin(model)
    talk(session, monkeypatch, f"'{picture}' One")
    assert session.messages == []
    assert session.attachments == [Attachment("image", str(picture))]
    model.trouble = None
    talk(session, monkeypatch, "Two")
    assert len(session.messages[0]["content"]) == 2, "the picture goes with the next question"


async def test_a_running_server() -> None:
    async with running(FakeFrontend(), api_key=("k",)) as server:

        def ask() -> str:
            model = RemoteModel(server.base_url, api_key="k")
            assert model.name == "demo"
            messages = [{"role": "user", "content": "Hi"}]
            return "".join(model.stream(messages, {"max_tokens": 50, "temperature": 0.0}))

        assert await asyncio.to_thread(ask) == "Hello, world!"
        [call] = server.frontend.calls
        assert (call.params.max_tokens, call.params.temperature) == (50, 0.0)


async def test_the_whole_command_against_a_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], picture: Path
) -> None:
    async with running() as server:
        monkeypatch.setattr("sys.stdin", io.StringIO("What is this?\n/exit\n"))
        argv = ["chat", "--base-url", server.base_url, "--image", str(picture), "--top-k", "5"]
        assert await asyncio.to_thread(main, argv) == 0
        assert "Hello, world!" in capsys.readouterr().out
        [call] = server.frontend.calls
        assert len(call.prompt.conversation.refs) == 1
        assert call.params.top_k == 5


async def test_what_a_server_refuses_is_told() -> None:
    async with running(FakeFrontend(), api_key=("k",)) as server:
        with pytest.raises(SensoriumError, match="needs an API key"):
            await asyncio.to_thread(RemoteModel, server.base_url)
        model = await asyncio.to_thread(RemoteModel, server.base_url, api_key="k")
        server.frontend.between = fail(RuntimeError("inside"))
        with pytest.raises(SensoriumError, match="failed to answer"):
            await asyncio.to_thread(list, model.stream([{"role": "user", "content": "a"}], {}))


async def test_stopping_an_answer_frees_the_work() -> None:
    async with running(FakeFrontend(between=hang)) as server:
        model = await asyncio.to_thread(RemoteModel, server.base_url)
        answer: Any = model.stream([{"role": "user", "content": "a"}], {})
        assert await asyncio.to_thread(next, answer) == ""
        assert await asyncio.to_thread(next, answer) != ""
        await asyncio.to_thread(answer.close)
        await until(lambda: server.frontend.num_open == 0)


def test_addresses_that_lead_nowhere() -> None:
    with pytest.raises(ConfigError):
        RemoteModel("ftp://example.com")
    with pytest.raises(UnavailableError, match="does not answer"):
        RemoteModel("http://127.0.0.1:1")


@pytest.mark.parametrize(
    "written",
    [
        "'/{folder}/it'\\''s a \"b\".png'",  # GNOME Terminal, Konsole
        "'/{folder}/it'\"'\"'s a \"b\".png'",  # Kitty
        '/{folder}/it\\\'s\\ a\\ \\"b\\".png',  # macOS Terminal, iTerm2
        '"/{folder}/it\'s a \\"b\\".png"',
        "file:///{folder}/it%27s%20a%20%22b%22.png",
    ],
)
def test_names_as_terminals_write_them(written: str, tmp_path: Path) -> None:
    file = tmp_path / 'it\'s a "b".png'
    file.write_bytes(b"data")
    line = written.format(folder=str(tmp_path)[1:])
    text, [attachment] = split_line(f"{line} What\nis  this?")
    assert text == "What\nis this?"
    assert attachment.path == file
    assert attachment.name == file.name


def test_a_long_url_has_a_short_name() -> None:
    attachment = Attachment("image", f"data:image/png;base64,{'A' * 10_000}")
    assert len(attachment.name) == 80
    assert attachment.is_remote


def test_thoughts_are_no_part_of_the_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Echo()
    model.first = Thought("Let me think.")
    session = begin(model)
    talk(session, monkeypatch, "One")
    assert session.messages[-1]["content"] == " 1"
    assert capsys.readouterr().out == " 1\n"


def test_pieces_of_a_server() -> None:
    deltas = [{"reasoning_content": "a"}, {"reasoning": "b"}, {"content": "c"}, {"role": "x"}, {}]
    chunk = {"choices": [{"delta": delta} for delta in deltas]}
    pieces = [piece for piece in pieces_of(chunk) if piece]
    assert pieces == ["a", "b", "c"]
    assert [isinstance(piece, Thought) for piece in pieces] == [True, True, False]
