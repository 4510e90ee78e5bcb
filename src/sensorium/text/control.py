"""Control tokens, and how to keep those that users type from acting.

Two devices work together. A *mark* is one private-use character that occurs in none of the texts
of a request; put into a typed spelling it breaks the spelling until the template has run. An
*alias* is a secret name: a twin of the tokenizer knows each control token only by its alias, so
that in its eyes a typed ``<|im_start|>`` is ordinary text, whereas the ones that the template
wrote are replaced by aliases before encoding. One call encodes the whole prompt, therefore spaces
and merges around the tokens come out as in the original tokenizer.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import tokenizers

from sensorium.errors import InvalidRequestError
from sensorium.text.backend import ids_of

# Non-special added tokens of some vocabularies that are mere text: a user's table markup must be
# encoded as such.
_MARKUP = frozenset(
    (
        *("table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td", "ul", "ol", "li"),
        *("h1", "h2", "h3", "h4", "h5", "h6", "p", "br", "hr", "a", "img", "blockquote"),
        *("strong", "em", "b", "i", "u", "s", "sub", "sup", "code"),
    )
)
_TAG = re.compile(r"</?([a-z][a-z0-9]*)>")

_FIRST_MARK, _NUM_MARKS = (
    0x100000,
    0xFFFD,
)  # plane 16, private use; its last character borders the aliases
_BORDER = chr(_FIRST_MARK + _NUM_MARKS)
_MARKS = re.compile(f"[{chr(_FIRST_MARK)}-{_BORDER}]")


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """Spellings that act in a prompt, such as ``<|im_start|>`` and ``<image>``.

    All special tokens, and added tokens other than white space and plain markup.
    """

    spellings: tuple[str, ...]
    pattern: re.Pattern[str]
    prefixes: frozenset[str]
    suffixes: frozenset[str]
    middles: str
    max_length: int

    @classmethod
    def of(cls, added: Iterable[Any], extra: Iterable[str] = ()) -> ControlTokens:
        """``added``: the library's AddedToken objects.

        ``extra``: spellings that act for other reasons.
        """
        texts = {t.content for t in added if t.special or not _is_text(t.content)} | set(extra)
        return cls.from_texts(text for text in texts if text)

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> ControlTokens:
        """The tables for a set of spellings."""
        longest_first = tuple(sorted(set(texts), key=lambda t: (-len(t), t)))
        long = [t for t in longest_first if len(t) > 1]
        return cls(
            spellings=longest_first,
            pattern=re.compile(_either(longest_first)),
            prefixes=frozenset(t[:k] for t in long for k in range(1, len(t))),
            suffixes=frozenset(t[k:] for t in long for k in range(1, len(t))),
            middles="\0".join(t[1:-1] for t in long),
            max_length=len(longest_first[0]) if longest_first else 0,
        )

    def plus(self, extra: Iterable[str]) -> ControlTokens:
        """The same with more spellings."""
        more = set(extra) - set(self.spellings)
        return ControlTokens.from_texts({*self.spellings, *more}) if more else self

    def occurs(self, text: str) -> bool:
        """Return whether one of the spellings is in ``text``."""
        return self.pattern.search(text) is not None

    def cut(self, text: str, knife: str) -> str:
        """Return ``text`` with ``knife`` after the first character of every spelling.

        Also of those that overlap.
        """
        pieces = []
        pos = 0
        while found := self.pattern.search(text, pos):
            end = found.start() + 1
            pieces += [text[pos:end], knife]
            pos = end
        return "".join([*pieces, text[pos:]])

    def protect(self, text: str, mark: str, *, whole_only: bool = False) -> str:
        """Return ``text`` with ``mark`` put in so that no control token can arise.

        Neither alone nor with its neighbours.

        ``whole_only`` looks at complete spellings only and leaves the borders alone: for texts
        that a template compares. Raises InvalidRequestError for a control token of one character,
        which cannot be broken.
        """
        if self.occurs(text):
            for found in self.pattern.finditer(text):
                if len(found[0]) == 1:
                    raise InvalidRequestError(
                        f"The text holds {found[0]!r}, which this model reserves; leave it out."
                    )
            text = self.cut(text, mark)
        core = text.strip()
        if whole_only or not core:
            return text
        start = text.index(core)
        end = start + len(core)
        reach = min(len(core), self.max_length - 1)
        if any(core[-k:] in self.prefixes for k in range(1, reach + 1)):
            text = text[:end] + mark + text[end:]
        opens = any(core[:k] in self.suffixes for k in range(1, reach + 1))
        if opens or (len(core) <= self.max_length - 2 and core in self.middles):
            text = text[:start] + mark + text[start:]
        return text


def pick_mark(texts: Iterable[str], *, not_in: str = "") -> str:
    """A random private-use character that occurs in none of ``texts``."""
    taken = {char for text in texts for char in _MARKS.findall(text)} | set(not_in)
    while (mark := chr(_FIRST_MARK + secrets.randbelow(_NUM_MARKS))) in taken:
        if len(taken) >= _NUM_MARKS:
            raise InvalidRequestError("The request uses all private-use characters of plane 16.")
    return mark


def unmark(text: str, mark: str) -> str:
    """``text`` without ``mark``, also where a template wrote it as a JSON escape."""
    if mark not in text and "\\u" not in text:
        return text
    escaped = json.dumps(mark)[1:-1]
    return text.replace(mark, "").replace(escaped, "").replace(escaped.upper(), "")


class InertEncoder:
    """A twin of a tokenizer that knows the control tokens by secret names only.

    The names are random for each instance and never leave it.
    """

    def __init__(self, backend: tokenizers.Tokenizer, control: ControlTokens) -> None:
        layout = json.loads(backend.to_str())
        nonce = secrets.token_hex(12)
        control_texts = set(control.spellings)
        self._alias: dict[str, str] = {}
        self._separator = f"{_BORDER}{nonce}s{_BORDER}"
        real_ids: dict[str, int] = {}
        for number, token in enumerate(layout["added_tokens"]):
            if token["content"] in control_texts:
                alias = f"{_BORDER}{nonce}x{number}{_BORDER}"
                self._alias[token["content"]] = alias
                token["content"] = alias
            real_ids[token["content"]] = token["id"]
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        layout["added_tokens"].append(
            {"id": 0, "content": self._separator, **dict.fromkeys(flags, False)}
        )
        _fix_ids(layout["model"]["vocab"], real_ids, [*self._alias.values(), self._separator])
        layout["post_processor"] = None
        layout["truncation"] = layout["padding"] = None
        self._twin = _from_layout(layout)
        self._real = {self._twin.token_to_id(name): token_id for name, token_id in real_ids.items()}
        self._separator_id = self._twin.token_to_id(self._separator)
        self._control_ids = {real_ids[alias] for alias in self._alias.values()}
        self._control = control
        longest_first = sorted(self._alias, key=len, reverse=True)
        self._alias_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode_plain(self, text: str) -> list[int]:
        """Ids of ``text``, in which nothing acts."""
        return self.encode_pieces([(text, False)])

    def encode_pieces(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        """Ids of the joined pieces ``(text, acts)``.

        A piece that acts is a control token, the others are plain text.

        Raises InvalidRequestError for text that is not valid Unicode, and for text that the
        tokenizer turns into a control token whatever one does.
        """
        pieces = list(pieces)
        ids = self._encode("".join(self._acting(t) if acts else t for t, acts in pieces))
        if ids is None:  # the base vocabulary itself spells a control token: cut such words apart
            cut = self._separator
            split = [(t if acts else self._control.cut(t, cut), acts) for t, acts in pieces]
            ids = self._encode("".join(self._acting(t) if acts else t for t, acts in split))
        if ids is None:
            raise InvalidRequestError("The text holds a word that this model reserves.")
        return ids

    def _acting(self, text: str) -> str:
        """A piece that acts with its control tokens under their secret names.

        A placeholder may consist of several.
        """
        if text in self._alias:
            return self._alias[text]
        return self._alias_pattern.sub(lambda found: self._alias[found[0]], text)

    def _encode(self, text: str) -> list[int] | None:
        """Real ids, or None when one of the control tokens came out of plain text."""
        try:
            ids = ids_of(self._twin, text, add_special_tokens=False)
        except TypeError as error:
            raise InvalidRequestError(
                "The text contains a lone surrogate, which is not valid Unicode."
            ) from error
        if not self._control_ids.isdisjoint(i for i in ids if i not in self._real):
            return None
        return [self._real.get(i, i) for i in ids if i != self._separator_id]


def _fix_ids(vocab: Any, real_ids: dict[str, int], new_names: list[str]) -> None:
    """Give the new names ids of their own, above all others; kept names keep theirs.

    A list has no holes, so the library numbers them right by itself.
    """
    if not isinstance(vocab, dict):
        return
    for name, token_id in real_ids.items():
        if name not in new_names:
            vocab.setdefault(name, token_id)
    top = max(max(vocab.values(), default=0), *real_ids.values(), 0) + 1
    for number, name in enumerate(new_names):
        vocab[name] = top + number


def _from_layout(layout: dict[str, Any]) -> tokenizers.Tokenizer:
    twin = tokenizers.Tokenizer.from_str(json.dumps(layout))
    twin.encode_special_tokens = False
    return twin


def _either(texts: Iterable[str]) -> str:
    """Return a regular expression for the longest of ``texts`` that fits.

    Its cost does not grow with their number.
    """
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(text[:1], []).append(text)
    branches = []
    for first, group in sorted(groups.items(), reverse=True):  # the empty rest comes last
        stem = _common_start(min(group), max(group))
        rests = {text[len(stem) :] for text in group}
        branches.append(re.escape(stem) + (_either(rests) if first and len(rests) > 1 else ""))
    return f"(?:{'|'.join(branches)})" if branches else "(?!)"


def _common_start(one: str, other: str) -> str:
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return one[:i]
    return min(one, other, key=len)


def _is_text(content: str) -> bool:
    """Return whether a non-special added token is mere text: white space or a plain markup tag."""
    tag = _TAG.fullmatch(content)
    return not content.strip(" \t\r\n▁") or (tag is not None and tag[1] in _MARKUP)
