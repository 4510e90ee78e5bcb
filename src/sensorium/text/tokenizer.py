"""Tokenizers of model folders, on the ``tokenizers`` library alone.

Starting does not import ``transformers``.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from sensorium.errors import ConfigError, InvalidRequestError
from sensorium.text.backend import ids_of
from sensorium.text.control import ControlTokens, InertEncoder
from sensorium.text.spelling import Spelling

ApplyTemplate = Callable[..., str]
"""Function that renders a conversation, with the options of ``Tokenizer.apply_chat_template`` as
keywords."""


class Tokenizer:
    """Tokenizer of a model folder; immutable once built, usable from several threads.

    ``special_tokens`` maps names such as ``bos_token`` to their text, as chat templates see them.
    ``eos_token_ids`` are all ids that end a generation: the tokenizer's own and those of
    ``generation_config.json`` and ``config.json``. These, the tokens that begin and pad a text and
    ``control_ids`` act in a prompt, whether or not the files call them special; ``</s>`` does where
    ``<s>`` does.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
        control_ids: Sequence[int] = (),
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        self._backend = backend
        self.spelling = Spelling.of(backend)
        self.special_tokens: dict[str, str] = dict(special_tokens or {})
        self._added: dict[int, Any] = dict(backend.get_added_tokens_decoder())
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = len(vocab)
        self.max_token_id = max(vocab.values(), default=-1)
        self.all_special_ids = frozenset(i for i, t in self._added.items() if t.special)
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        self.pad_token_id = self._named_id("pad_token")
        own = () if self.eos_token_id is None else (self.eos_token_id,)
        self.eos_token_ids = tuple(dict.fromkeys((*own, *eos_token_ids)))
        named = (self.bos_token_id, self.pad_token_id, *self.eos_token_ids, *control_ids)
        self.control = ControlTokens.of(self._added.values(), self._acting(named))
        self.prefix_ids, self.suffix_ids = self._surroundings()
        self._inert: InertEncoder | None = None
        self.template: ApplyTemplate | None = None
        self._lock = threading.Lock()

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        trust_remote_code: bool = False,
        eos_token_ids: Sequence[int] = (),
    ) -> Tokenizer:
        """Read the tokenizer of a model folder.

        ``tokenizer.json`` is the truth where there is one; otherwise ``transformers`` converts
        what the folder has. ``eos_token_ids`` are added to those that the files name. Raises
        ConfigError when there is no usable tokenizer.
        """
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if file.is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(file))
                known: Mapping[str, Any] = {}
            except Exception as error:  # the library raises plain Exception
                raise ConfigError(f"tokenizer.json cannot be read: {error}") from error
        else:
            backend, known = _converted(folder, trust_remote_code)
        config = read_json(folder / "tokenizer_config.json")
        config = {**known, **read_json(folder / "special_tokens_map.json"), **config}
        _complete(backend, config)
        named = {name: _content(value) for name, value in _named(config)}
        control_ids: list[int] = []
        for name in ("generation_config.json", "config.json"):
            values = read_json(folder / name)
            eos_token_ids = (*eos_token_ids, *_ids(values, "eos_token_id"))
            control_ids += [*_ids(values, "bos_token_id"), *_ids(values, "pad_token_id")]
        return cls(
            backend,
            special_tokens=named,
            eos_token_ids=eos_token_ids,
            control_ids=control_ids,
        )

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """Object of the library; read only."""
        return self._backend

    def encode(
        self, text: str, *, add_special_tokens: bool = True, allow_special: bool = True
    ) -> list[int]:
        """Return the token ids of ``text``.

        ``add_special_tokens`` puts what the tokenizer prescribes around it (a BOS for Llama). With
        ``allow_special=False`` special and added tokens that are spelled out in the text are
        encoded as plain text. Raises InvalidRequestError when the text is not valid Unicode.
        """
        if not allow_special and self.control.occurs(text):
            ids = self.inert.encode_plain(text)
            return [*self.prefix_ids, *ids, *self.suffix_ids] if add_special_tokens else ids
        try:
            return ids_of(self._backend, text, add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise not_text(text) from error

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each token by its text, added tokens included."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **chat_template_kwargs: Any,
    ) -> str | list[int]:
        """Return the prompt of a conversation: its ids or, without ``tokenize``, its text.

        As the tokenizers of ``transformers`` do, with the template that the model was loaded with:
        special tokens that the messages spell act when the prompt is tokenized, and parts of media
        become placeholders. Raises InvalidRequestError.
        """
        if self.template is None:
            raise InvalidRequestError("This tokenizer was not loaded with a model's chat template.")
        text = self.template(
            conversation,
            tools=tools,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    @property
    def inert(self) -> InertEncoder:
        """Encoder in which only control tokens that we insert act.

        Built at the first use, which takes about a second for a vocabulary of 150,000.
        """
        with self._lock:
            if self._inert is None:
                self._inert = InertEncoder(self._backend, self.control)
            return self._inert

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ``token_ids``.

        Raises InvalidRequestError for an id outside the vocabulary.
        """
        self.check_ids(token_ids)
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def check_ids(self, token_ids: Sequence[int], param: str | None = None) -> None:
        """Raise InvalidRequestError when an id is not an integer or outside the vocabulary."""
        for token_id in token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise InvalidRequestError(
                    f"Token ids must be integers, got {token_id!r:.80}.", param=param
                )
            if not 0 <= token_id <= self.max_token_id:
                raise InvalidRequestError(
                    f"Token id {token_id} is outside the vocabulary (0 to {self.max_token_id}).",
                    param=param,
                )

    def token_text(self, token_id: int) -> str:
        """Return how the vocabulary spells a token (``Ġhello``, ``▁hello``, ``<|im_end|>``).

        Empty for an unused id. Raises InvalidRequestError for an id outside the vocabulary.
        """
        self.check_ids((token_id,))
        return self._backend.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for in the middle of a text.

        Empty for an id without a token, as those that pad a model's vocabulary beyond its
        tokenizer's.
        """
        if token_id > self.max_token_id:
            return b""
        token = self.token_text(token_id)
        return token.encode() if self.is_added(token_id) else self.spelling.to_bytes(token)

    def bad_words_token_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return the id sequences of words that must not be generated.

        At the start of a text, and after a space.

        The second form counts where it is as long as the first and begins with another token; else
        it would forbid the bare space. Raises InvalidRequestError for a word that has no tokens.
        """
        sequences: dict[tuple[int, ...], None] = {}
        for i, word in enumerate(words):
            plain = tuple(self.encode(word.lstrip(), add_special_tokens=False))
            if not plain:
                raise InvalidRequestError(
                    f"bad_words[{i}] is {word!r}, which has no tokens.", param=f"bad_words[{i}]"
                )
            sequences[plain] = None
            spaced = tuple(self.encode(" " + word.lstrip(), add_special_tokens=False))
            if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
                sequences[spaced] = None
        return tuple(sequences)

    def token_id(self, text: str) -> int | None:
        """Return the id of the token that is spelled ``text``, or None."""
        found = self._backend.token_to_id(text)
        return None if found is None else int(found)

    def added_ids(self) -> dict[str, int]:
        """Return the ids of tokens on top of the base vocabulary, by their spelling."""
        return {token.content: i for i, token in self._added.items()}

    def is_special(self, token_id: int) -> bool:
        """Return True if decoding with ``skip_special_tokens`` leaves the token out."""
        return token_id in self.all_special_ids

    def is_added(self, token_id: int) -> bool:
        """Return True for a token on top of the base vocabulary.

        Special ones, and others such as ``<tool_call>``.
        """
        return token_id in self._added

    def _acting(self, named: Sequence[int | None]) -> set[str]:
        """Return the texts of the tokens ``named``.

        And of those that end what special tokens begin.
        """
        texts = {token.content for token in self._added.values()}
        acting = {self._added[i].content for i in named if i in self._added}
        special = {token.content for token in self._added.values() if token.special}
        ends = {_counterpart(text) for text in acting | special} & texts
        return {text for text in acting | ends if text.strip()}

    def _named_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.token_id(text)

    def _surroundings(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids that ``add_special_tokens`` puts before and after a text."""
        bare = self._backend.encode("a", add_special_tokens=False).ids
        full = self._backend.encode("a", add_special_tokens=True).ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return tuple(full[:start]), tuple(full[start + len(bare) :])
        return (), ()


def not_text(text: object) -> InvalidRequestError:
    """Return the error for a prompt that is no valid Unicode string."""
    if isinstance(text, str):
        return InvalidRequestError(
            "The text contains a lone surrogate, which is not valid Unicode."
        )
    return InvalidRequestError(f"A text must be a string, got {type(text).__name__}.")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one without the file.

    Raises ConfigError for a malformed one.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path.name} must hold a JSON object.")
    return value


def _converted(
    folder: Path, trust_remote_code: bool
) -> tuple[tokenizers.Tokenizer, Mapping[str, Any]]:
    """Convert a tokenizer without ``tokenizer.json`` by ``transformers``.

    Return it and its named tokens.
    """
    from transformers import AutoTokenizer

    try:
        slow = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ConfigError(
            "The model folder has no tokenizer.json, and transformers cannot make a tokenizer of "
            f"its files ({type(error).__name__}). Pass the folder of a tokenizer with --tokenizer."
        ) from error
    backend = getattr(slow, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ConfigError(
            f"The tokenizer class {type(slow).__name__} has no form that Sensorium can use. Pass "
            "the folder of a tokenizer that has a tokenizer.json with --tokenizer."
        )
    return backend, dict(slow.special_tokens_map)


def _named(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the entries ``*_token`` of a tokenizer's configuration."""
    return [
        (key, value)
        for key, value in config.items()
        if key.endswith("_token") and isinstance(value, str | Mapping) and value
    ]


def _complete(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Add the tokens that the configuration names and ``tokenizer.json`` lacks.

    In the order of their ids.

    Named tokens become special, as in ``transformers``.
    """
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    missing = [
        _added_token(entry)
        for _, entry in sorted(listed.items(), key=lambda item: int(item[0]))
        if _content(entry) not in known
    ]
    if missing:
        backend.add_tokens(missing)
        known |= {token.content: token for token in missing}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, Mapping):
        extra = list(extra.values())
    special = []
    for entry in (*(value for _, value in _named(config)), *extra):
        content = _content(entry)
        old = known.get(content)
        if not content or (old is not None and old.special):
            continue
        token = old or (
            _added_token(entry)
            if isinstance(entry, Mapping)
            else tokenizers.AddedToken(content, normalized=False)
        )
        token.special = True
        special.append(token)
    if special:
        backend.add_special_tokens(special)


def _content(entry: Any) -> str:
    return str(entry["content"]) if isinstance(entry, Mapping) else str(entry)


def _added_token(entry: Any) -> tokenizers.AddedToken:
    if not isinstance(entry, Mapping):
        return tokenizers.AddedToken(str(entry))
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return tokenizers.AddedToken(
        _content(entry), **{k: bool(entry[k]) for k in flags if k in entry}
    )


def _counterpart(text: str) -> str:
    """Return ``</s>`` for ``<s>``; empty for texts of another form."""
    return f"</{text[1:]}" if re.fullmatch(r"<\w+>", text) else ""


def _ids(config: Mapping[str, Any], field: str) -> tuple[int, ...]:
    """Return the token ids in a field of a configuration: a number or a list.

    Also within ``text_config``.
    """
    found: list[int] = []
    for holder in (config, config.get("text_config") or {}):
        value = holder.get(field)
        values = value if isinstance(value, list) else [value]
        found.extend(v for v in values if type(v) is int and v >= 0)
    return tuple(found)
