"""Requests that nobody should send, and some that anybody might.

Bodies with a few fields changed, media that are damaged, texts that spell special tokens, bytes
that are no JSON.
"""

from __future__ import annotations

import base64
import json
import random
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from sensorium.multimodal.decode.video.video_frames import is_packed
from sensorium.multimodal.items import MODALITIES, Modality
from sensorium.server.openai.protocol import (
    BatchBody,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    TokenizeBody,
)
from tests.fuzz import documents, embeddings
from tests.fuzz.corpus import corpus, kind_of
from tests.fuzz.mutation import mutate
from tests.fuzz.values import GOOD, Values

BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/embeddings": EmbeddingBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/v1/batches": BatchBody,
}
_PATHS = tuple(BODIES)
_WEIGHTS = (70, 12, 4, 10, 4, 3)
MAX_TOKENS = 6
_TYPES = {"image": "image_url", "video": "video_url", "audio": "audio_url"}


@dataclass(frozen=True, slots=True)
class Sent:
    """A request, byte for byte.

    ``value``: what the body holds, where it is JSON; ``what``: what was done to it.
    """

    path: str
    body: bytes
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    value: Any = None
    what: str = ""

    def to_json(self) -> dict[str, Any]:
        """For a file from which it can be sent again."""
        return {
            "method": self.method,
            "path": self.path,
            "headers": dict(self.headers),
            "body": base64.b64encode(self.body).decode(),
            "what": self.what,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Sent:
        """What ``to_json`` gave."""
        body = base64.b64decode(stored["body"])
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            value = None
        return cls(stored["path"], body, stored["method"], stored["headers"], value, stored["what"])


@dataclass(frozen=True, slots=True)
class Target:
    """What is known of the served model: its ``modalities``, the texts of its special tokens."""

    modalities: tuple[Modality, ...]
    special_tokens: tuple[str, ...] = ("<|im_start|>", "<|im_end|>", "<|image_pad|>")


class RequestMaker:
    """Makes requests for one model, each a function of the generator's state."""

    def __init__(self, target: Target, rng: random.Random) -> None:
        self._target = target
        self._rng = rng
        self._values = Values(rng, target.special_tokens)

    def make(self) -> Sent:
        """A request."""
        rng = self._rng
        if rng.random() < 0.04:
            return self._upload()
        path = rng.choices(_PATHS, _WEIGHTS)[0]
        body = self._good(path)
        changed = []
        for _ in range(rng.choice((0, 0, 0, 0, 0, 1, 1, 2))):
            name = rng.choice(sorted(n.alias or k for k, n in BODIES[path].model_fields.items()))
            body[name] = self._values.of(name)
            changed.append(name)
        if rng.random() < 0.03:
            body[self._values.name()] = self._values.any()
            changed.append("unknown")
        _bound(body)
        data = json.dumps(body).encode()
        if rng.random() < 0.04:
            return self._raw(path, data)
        if rng.random() < 0.03:
            return self._strange(path, data, body)
        return Sent(path, data, value=body, what=f"fields {', '.join(changed) or 'none'}")

    def _good(self, path: str) -> dict[str, Any]:
        """A body that is right, but for the media and the texts in it."""
        rng = self._rng
        if path == "/v1/completions":
            body: dict[str, Any] = {"prompt": self._values.prompt()}
        elif path == "/detokenize":
            return {"tokens": [rng.randrange(1300) for _ in range(rng.randrange(6))]}
        elif path == "/v1/batches":
            return {
                "input_file_id": rng.choice(("file-1", "../x", "file-" + "0" * 32)),
                "endpoint": rng.choice(_PATHS),
                "completion_window": rng.choice(("24h", "1m", "0d", "99999d", "soon")),
            }
        elif path == "/v1/embeddings":
            body = {"input": self._values.text()} if rng.random() < 0.5 else self._messages()
        elif path == "/tokenize":
            body = {"prompt": self._values.text()} if rng.random() < 0.3 else self._messages()
        else:
            body = self._messages()
        if path.startswith("/v1/c"):
            body |= {"max_tokens": rng.randrange(1, MAX_TOKENS + 1), "temperature": 0}
            for name in rng.sample(sorted(GOOD), rng.choice((0, 0, 1, 2))):
                if path.endswith("chat/completions") or name not in ("logprobs", "top_logprobs"):
                    body[name] = rng.choice(GOOD[name])
        return body

    def _messages(self) -> dict[str, Any]:
        rng = self._rng
        messages = [
            {"role": self._values.role(), "content": self._content()}
            for _ in range(rng.choice((0, 0, 1, 2)))
        ]
        if rng.random() < 0.05:
            messages.append(self._values.tool_talk())
        messages.append({"role": "user", "content": self._content()})
        return {"messages": messages}

    def _content(self) -> Any:
        rng = self._rng
        if rng.random() < 0.25:
            return self._values.text()
        parts: list[Any] = [self._media() for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        if rng.random() < 0.8:
            parts.insert(rng.randrange(len(parts) + 1), self._text_part())
        if rng.random() < 0.03:
            parts.append(self._values.any())
        return parts

    def _text_part(self) -> dict[str, Any]:
        return {"type": self._rng.choice(("text", "input_text")), "text": self._values.text()}

    # --- media ------------------------------------------------------------------------------------

    def _media(self) -> dict[str, Any]:
        rng = self._rng
        modality: Modality = rng.choice((*tuple(self._target.modalities) * 10, *MODALITIES))
        ways: tuple[Callable[[Modality], dict[str, Any]], ...] = (
            *((self._file,) * 12),
            *(self._document, self._document),
            *(self._embeds, self._embeds, self._cached, self._elsewhere, self._broken_part),
        )
        part = rng.choice(ways)(modality)
        if rng.random() < 0.15:
            part["uuid"] = self._values.uuid()
        return part

    def _file(self, modality: Modality) -> dict[str, Any]:
        rng = self._rng
        kind: Modality = rng.choice(MODALITIES) if rng.random() < 0.08 else modality
        name = rng.choice(sorted(corpus(kind)))
        data = corpus(kind)[name]
        if rng.random() < 0.6:
            others = [d for m in MODALITIES for d in corpus(m).values()]
            data = mutate(data, rng, others)
        if modality == "audio" and rng.random() < 0.5:
            form = rng.choice((name.split()[0], "wav", "mp3", "exe"))
            audio = {"data": base64.b64encode(data).decode(), "format": form}
            return {"type": "input_audio", "input_audio": audio}
        url = _data_url(data, kind_of(name, kind), rng)
        key = _TYPES[modality]
        return {"type": key, key: {"url": url} if rng.random() < 0.8 else url}

    def _document(self, modality: Modality) -> dict[str, Any]:
        rng = self._rng
        file = (
            documents.document(rng)
            if rng.random() < 0.8
            else corpus(modality)[rng.choice(sorted(corpus(modality)))]
        )
        text = base64.b64encode(file).decode()
        ways: tuple[dict[str, Any], ...] = (
            {"file_data": _data_url(file, "application/pdf", rng)},
            {"file_data": text, "filename": rng.choice(documents.NAMES)},
            {"file_id": rng.choice(("file-" + "0" * 32, "../../etc/passwd", self._values.text()))},
            {"file_url": self._values.forbidden_url()},
            {"file_data": text, "file_id": "file-1"},
        )
        payload = rng.choices(ways, (10, 10, 1, 1, 1))[0]
        if rng.random() < 0.5:
            return {"type": "file", "file": payload}
        return {"type": "input_file", **payload}

    def _embeds(self, modality: Modality) -> dict[str, Any]:
        rng = self._rng
        key = f"{modality}_embeds"
        good = rng.random() < 0.3
        payload = embeddings.good_payload(rng.randrange(3)) if good else embeddings.payload(rng)
        return {"type": key, key: payload}

    def _cached(self, modality: Modality) -> dict[str, Any]:
        key = _TYPES[modality]
        return {"type": key, key: None, "uuid": self._values.uuid()}

    def _elsewhere(self, modality: Modality) -> dict[str, Any]:
        key = _TYPES[modality]
        return {"type": key, key: {"url": self._values.forbidden_url()}}

    def _broken_part(self, modality: Modality) -> dict[str, Any]:
        part = self._file(modality)
        name = self._rng.choice((*part, "type", "uuid", "detail", self._values.name()))
        part[name] = self._values.any()
        return part

    # --- bytes ------------------------------------------------------------------------------------

    def _upload(self) -> Sent:
        """A form with a file."""
        body, kind = documents.form(self._rng, documents.document(self._rng))
        return Sent("/v1/files", body, headers={"content-type": kind}, what="an upload")

    def _raw(self, path: str, data: bytes) -> Sent:
        """A body that is hardly JSON any more."""
        rng = self._rng
        deep = rng.choice((10, 200, 5000, 100_000))
        shapes = (
            mutate(data, rng, ()),
            mutate(data, rng, ()),
            data[: rng.randrange(len(data) + 1)],
            data.replace(b"0", b"NaN", 1),
            data.replace(b"0", b"1e999", 1),
            data.replace(b"0", b"9" * rng.choice((20, 400, 5000)), 1),
            data[:-1] + b"," + data[1:],
            b"[" * deep,
            b'{"messages":' * deep,
            b'{"messages":' + b"[" * deep + b"]" * deep + b"}",
            b"\xff\xfe" + data,
            "\ufeff".encode() + data,
            data.decode().encode("utf-16"),
            b"null",
            b"",
        )
        return Sent(path, rng.choice(shapes), what="raw bytes")

    def _strange(self, path: str, data: bytes, value: Any) -> Sent:
        """Another path, method or header."""
        rng = self._rng
        headers = {"content-type": "application/json"}
        way = rng.randrange(4)
        if way == 0:
            paths = (
                "/",
                "/v1",
                "/v1/nothing",
                "/v1/chat/completions/",
                "/%00",
                "/../etc",
                "/v1//x",
            )
            return Sent(rng.choice(paths), data, headers=headers, what="another path")
        if way == 1:
            method = rng.choice(("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "FUZZ"))
            return Sent(path, data, method, headers, what="another method")
        if way == 2:
            kind = rng.choice(("text/plain", "", "application/json; charset=latin-1", "a" * 5000))
            return Sent(path, data, headers={"content-type": kind}, what="another content type")
        headers |= {
            "x-request-id": rng.choice(("a" * 400, "id", "../../x", "a b", "é")),
            "authorization": "Bearer wrong",
        }
        return Sent(path, data, headers=headers, value=value, what="further headers")


def _data_url(data: bytes, kind: str, rng: random.Random) -> str:
    """The bytes as one of the forms that a ``data:`` URL has, right or nearly so."""
    if is_packed(data[:16]) and rng.random() < 0.8:
        pictures = [d for n, d in corpus("image").items() if n.startswith("jpeg")]
        some = [rng.choice(pictures) for _ in range(rng.choice((1, 3, 8)))]
        texts = [base64.b64encode(picture).decode() for picture in some]
        return "data:video/jpeg;base64," + rng.choice((",", ",", ",,", " ")).join(texts)
    text = base64.b64encode(data).decode()
    forms = (
        *((f"data:{kind};base64,{text}",) * 12),
        f"data:application/octet-stream;base64,{text}",
        f"data:;base64,{text}",
        f"DATA:{kind};BASE64,{text}",
        f"data:{kind},{urllib.parse.quote(data[:2000])}",
        f"data:{kind};base64,{text[:-3]}",
        f"data:{kind};base64,{text[:50]}\n{text[50:]}",
        f"data:{kind};base64 {text}",
        f"data:{kind};base64,",
        text,
    )
    return rng.choice(forms)


def _bound(body: dict[str, Any]) -> None:
    """Keep a request that is right from being work for minutes: few tokens, few samples."""
    for name in ("max_tokens", "max_completion_tokens"):
        value = body.get(name)
        if isinstance(value, int) and value > 64:
            body["stop_token_ids"] = list(range(1300))
            body.pop("min_tokens", None)
            body.pop("ignore_eos", None)
    if "max_tokens" in body and body["max_tokens"] is None:
        body["max_tokens"] = MAX_TOKENS
    if type(body.get("n")) is int and 8 < body["n"] <= 16384:
        body["n"] = 8
