"""Structured outputs: from constraints to grammars, and to masks of next tokens.

``compile_grammar`` makes a checked grammar of a constraint; its text travels with the request; the
engine keeps one ``GrammarVocabulary`` and makes a ``GrammarMatcher`` per sequence. llguidance does
the parsing.

Compiling is bounded in what it makes, not in how long it takes: a dozen patterns that exclude one
another keep it busy for minutes. A server of untrusted clients lets ``engine.grammar.compiler`` do
it, in processes that can be ended.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sensorium.errors import ConfigError, InvalidRequestError
from sensorium.params import StructuredOutputs
from sensorium.text.grammar.json_grammar import MAX_SCHEMA_CHARS, json_grammar
from sensorium.text.grammar.json_text import JsonText, JsonTokens
from sensorium.text.grammar.library import (
    Grammar,
    check_chars,
    constraint_error,
    is_json,
    limits,
    problem_of,
    reason,
)
from sensorium.text.grammar.structural_tag import tag_grammar
from sensorium.text.tokenizer import Tokenizer

MAX_REGEX_CHARS = 1 << 14
MAX_GRAMMAR_CHARS = 1 << 18
MAX_CHOICES = 8192

STARTING_SECONDS = 2.0
TOKEN_SECONDS = 0.01
"""Processor time that the samples of a request may use together for following their grammar: at
all, and more for each of their tokens. A token takes a tenth of a millisecond; an ambiguous
grammar can make it a third of a second, for which all sequences of a step wait."""

TRIAL_SECONDS = 0.1
TRIAL_TOKEN_SECONDS = 0.001
"""The same for finding out which tokens of a sequence may be tried, as long as some is left."""


def check_size(outputs: StructuredOutputs) -> None:
    """Raise InvalidRequestError for a constraint that is too large to compile."""
    for name in ("json", "structural_tag"):
        if isinstance(getattr(outputs, name), Mapping):
            _check_nodes(getattr(outputs, name), name)
    for field, limit in (
        ("json", MAX_SCHEMA_CHARS),
        ("structural_tag", MAX_SCHEMA_CHARS),
        ("regex", MAX_REGEX_CHARS),
        ("grammar", MAX_GRAMMAR_CHARS),
        ("whitespace_pattern", MAX_REGEX_CHARS),
    ):
        value = getattr(outputs, field)
        if isinstance(value, str):
            check_chars(field, len(value), limit)
    if outputs.choice is not None:
        if len(outputs.choice) > MAX_CHOICES:
            raise constraint_error(
                "choice", f"has {len(outputs.choice)} entries; at most {MAX_CHOICES} are allowed"
            )
        check_chars("choice", sum(map(len, outputs.choice)), MAX_GRAMMAR_CHARS)


def compile_grammar(
    outputs: StructuredOutputs, special: Mapping[str, int] | None = None
) -> Grammar:
    """Return the grammar of a constraint, checked as far as possible without a vocabulary.

    ``special``: as for ``tag_grammar``. May take long. Raises InvalidRequestError, with the field
    as ``param``, for what cannot be parsed, is not supported or too large.
    """
    check_size(outputs)
    if outputs.json is not None or outputs.json_object:
        return json_grammar(outputs)
    if outputs.structural_tag is not None:
        return tag_grammar(outputs, special)
    text = grammar_text(outputs)
    problem = problem_of(text)
    if problem is not None:
        raise constraint_error(field_of(outputs), f"cannot be used: {problem}")
    return Grammar(text)


def grammar_text(outputs: StructuredOutputs) -> str:
    """The grammar of a constraint to anything but JSON, as text; not known to be usable.

    Raises InvalidRequestError, with the field as ``param``, for what is too large.
    """
    from llguidance import LLMatcher

    if outputs.regex is not None:
        return str(LLMatcher.grammar_from_regex(outputs.regex))
    if outputs.choice is not None:
        return str(LLMatcher.grammar_from_lark(_choice_grammar(outputs.choice)))
    return str(LLMatcher.grammar_from_lark(_lark(outputs.grammar or "")))


def field_of(outputs: StructuredOutputs) -> str:
    """The field of ``outputs`` that says what the text must be."""
    names = ("regex", "choice", "grammar", "structural_tag")
    given = (name for name in names if getattr(outputs, name) is not None)
    return next(given, "json")


def json_field(outputs: StructuredOutputs) -> str:
    """Return the field of ``outputs`` that may hold JSON schemas."""
    return "json" if outputs.structural_tag is None else "structural_tag"


class GrammarVocabulary:
    """The tokens of a model as the grammar engine needs them.

    Built once, which takes about a second for 150,000. ``special``: ids, by spelling, of added
    tokens that no text of a grammar matches, such as ``<tool_call>``, but those that end a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """``vocab_size`` is the width of the model's logits.

        Raises ConfigError when the tokenizer has no EOS.
        """
        from llguidance import LLTokenizer, TokenizerWrapper

        eos = [i for i in tokenizer.eos_token_ids if i < vocab_size]
        if not eos:
            raise ConfigError("Structured outputs need a tokenizer with an end-of-sequence token.")
        self.vocab_size = vocab_size
        num_ids = max(vocab_size, tokenizer.max_token_id + 1)
        try:
            self._tokens = LLTokenizer(
                tokenizer.backend.to_str(), n_vocab=num_ids, eos_token=list(eos)
            )
        except Exception:  # the library raises plain Exception: a decoder that it does not know
            spelled = TokenizerWrapper(_SpelledTokens(tokenizer, num_ids))
            self._tokens = LLTokenizer(spelled, n_vocab=num_ids, eos_token=list(eos))
        self._json_tokens = JsonTokens(self._bytes, vocab_size)
        self.special = {
            spelling: i
            for spelling, i in tokenizer.added_ids().items()
            if i < vocab_size and i not in eos and self._tokens.is_special_token(i)
        }

    def _bytes(self, token_id: int) -> bytes:
        return bytes(self._tokens.decode_bytes([token_id]))

    @classmethod
    def from_folder(cls, folder: str, vocab_size: int) -> GrammarVocabulary:
        """Return the vocabulary of a model folder, read as by ``Tokenizer.from_folder``."""
        return cls(Tokenizer.from_folder(folder), vocab_size)

    def matcher(self, grammar: str) -> GrammarMatcher:
        """A matcher at the start of ``grammar``.

        Raises InvalidRequestError when it cannot be used.
        """
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=limits())
        if matcher.is_error():
            raise InvalidRequestError(
                f"The grammar cannot be used: {reason(matcher.get_error())}",
                param="structured_outputs",
            )
        text = JsonText(self._json_tokens) if is_json(grammar) else None
        return GrammarMatcher(matcher, self.vocab_size, Budget(), text)

    def check(self, outputs: StructuredOutputs) -> Grammar:
        """``compile_grammar``, and as far as the first mask.

        What this lets through will start in an engine.

        May take long. Raises InvalidRequestError as ``compile_grammar`` does.
        """
        grammar, name = compile_grammar(outputs, self.special), field_of(outputs)
        try:
            matcher = self.matcher(grammar.text)
        except InvalidRequestError as error:
            raise constraint_error(name, f"cannot be used: {error.message}") from error
        words = np.zeros((self.vocab_size + 31) // 32, np.int32)
        matcher.mask(words)
        if matcher.error is not None:
            raise constraint_error(name, f"cannot be used: {matcher.error}")
        if not words.any():
            raise constraint_error(
                name, "cannot be used: no text of this model's tokens can fulfil it"
            )
        return grammar


class Budget:
    """Processor time left, such as that of all samples of a request for following their grammar."""

    def __init__(self, seconds: float = STARTING_SECONDS) -> None:
        self._seconds_left = self._most = seconds

    @property
    def is_used_up(self) -> bool:
        """Return whether more has been taken than there was."""
        return self._seconds_left < 0

    def take(self, seconds: float) -> None:
        """So much was used; less than nothing for what a token brings.

        Nothing is saved up for one long step.
        """
        self._seconds_left = min(self._seconds_left - seconds, self._most)


class GrammarMatcher:
    """State of one sequence in its grammar.

    A token that the grammar does not allow, or a limit reached while parsing, puts the matcher
    into an error state, ``error``, which it never leaves; ``mask`` then allows nothing. The caller
    ends the sequence. So does a grammar that costs more processor time than ``STARTING_SECONDS``
    and ``TOKEN_SECONDS`` for each token, all samples of its request, which share a ``Budget``,
    taken together.
    """

    def __init__(
        self,
        matcher: Any,
        vocab_size: int,
        budget: Budget,
        text: JsonText | None = None,
        trials: Budget | None = None,
    ) -> None:
        """``text``: where JSON stands; None for other texts. ``trials``: for ``num_allowed``."""
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._budget = budget
        self._text = text
        self._trials = Budget(TRIAL_SECONDS) if trials is None else trials

    def fresh(self, budget: Budget | None = None) -> GrammarMatcher:
        """A matcher of the same grammar, where this one stands.

        Only one that is at the start may be asked.

        It goes on with this one's budgets, as a sequence that starts again does, unless it is given
        another, which is for another sequence.
        """
        return GrammarMatcher(
            self._matcher.deep_copy(),
            self._vocab_size,
            self._budget if budget is None else budget,
            None if self._text is None else self._text.fresh(),
            self._trials if budget is None else None,
        )

    @property
    def is_accepting(self) -> bool:
        """Return whether the text could end here."""
        return bool(self._matcher.is_accepting())

    @property
    def error(self) -> str | None:
        """Return the error message, or None."""
        if self._matcher.is_error():
            return reason(self._matcher.get_error())
        return "it takes too long to follow" if self._budget.is_used_up else None

    def mask(self, out: Any) -> None:
        """Write the tokens that may come next into ``out``.

        ``out``: int32, (ceil(vocab_size / 32),), numpy array or CPU tensor; bit i % 32 of word i
        // 32 is token i. When the grammar is finished, only end-of-sequence tokens are allowed.
        """
        words = out if isinstance(out, np.ndarray) else out.numpy()
        words[:] = 0
        if self.error is not None:
            return
        began = time.thread_time()
        allowed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)
        self._budget.take(time.thread_time() - began)
        num_words = min(len(allowed), len(words), (self._vocab_size + 31) // 32)
        words[:num_words] = allowed[:num_words]
        rest = self._vocab_size % 32
        if rest and num_words == (self._vocab_size + 31) // 32:
            words[num_words - 1] &= np.int32((1 << rest) - 1)
        if self._text is not None:
            self._text.end_number(words)

    def closing_token(self, mask: Any) -> int | None:
        """The token that a model means which wants to end where ``mask`` does not allow it.

        Of JSON, the end of what is open; None when there is no such token.
        """
        if self._text is None or self.is_accepting:
            return None
        return self._text.closing_token(mask)

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """Return how many of the tokens may follow one another from here, as far as time allows.

        They are tried on a copy, in a time of its own: neither a limit of the library that they
        reach nor what they cost changes anything for the sequence. 0 in the end, after an error,
        and for ever once that time is used up, or when the library raises, which is passed on.
        """
        if self._trials.is_used_up or self.error is not None or self._matcher.is_stopped():
            return 0
        num, began = 0, time.thread_time()
        try:
            copy = self._matcher.deep_copy()
            while num < len(token_ids) and copy.consume_token(token_ids[num]):
                num += 1
                now = time.thread_time()
                self._trials.take(now - began)
                began = now
                if self._trials.is_used_up:
                    break
        except Exception:
            self._trials.take(math.inf)
            raise
        self._trials.take(time.thread_time() - began)
        return num

    def accept(self, token_id: int) -> bool:
        """Go on by one token; False when the grammar does not allow it."""
        began = time.thread_time()
        taken = bool(self._matcher.consume_token(token_id))
        if self._text is not None:
            self._text.follow(token_id)
        self._budget.take(time.thread_time() - began - TOKEN_SECONDS)
        if not self._trials.is_used_up:
            self._trials.take(-TRIAL_TOKEN_SECONDS)
        return taken


class _SpelledTokens:
    """A vocabulary as bytes, for tokenizers that the grammar engine cannot read itself."""

    def __init__(self, tokenizer: Tokenizer, num_ids: int) -> None:
        known = range(min(num_ids, tokenizer.max_token_id + 1))
        self.tokens = [tokenizer.token_bytes(i) for i in known]
        self.tokens += [b""] * (num_ids - len(self.tokens))
        self.special_token_ids = sorted(tokenizer.all_special_ids)
        self.eos_token_id = tokenizer.eos_token_ids[0]
        self.bos_token_id = tokenizer.bos_token_id
        self._ids = {data: i for i, data in enumerate(self.tokens) if not tokenizer.is_special(i)}
        self._longest = max(map(len, self.tokens), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """The longest token that fits, again and again.

        The engine needs ids that spell exactly ``text``, whereas the tokenizer itself would put a
        space in front. Bytes that no token begins with are left out.
        """
        ids = []
        pos = 0
        while pos < len(text):
            for length in range(min(self._longest, len(text) - pos), 0, -1):
                token_id = self._ids.get(text[pos : pos + length])
                if token_id is not None:
                    ids.append(token_id)
                    pos += length
                    break
            else:
                pos += 1
        return ids


def _choice_grammar(choices: tuple[str, ...]) -> str:
    lark = "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    check_chars("choice", len(lark), MAX_GRAMMAR_CHARS)
    return lark


def _lark(grammar: str) -> str:
    """A Lark grammar; one in llama.cpp's notation (``root ::= …``) is converted."""
    if "::=" not in grammar:
        return grammar
    from llguidance import gbnf_to_lark

    try:
        return str(gbnf_to_lark.gbnf_to_lark(grammar))
    except Exception as error:  # the converter raises what its parser happens to meet
        raise constraint_error(
            "grammar", f"is neither a Lark nor a GBNF grammar: {error}"
        ) from error


def _check_nodes(schema: Mapping[str, Any], name: str) -> None:
    """Refuse a schema whose text is too long, without writing it.

    Each value is a character of it at least.
    """
    num_chars, todo = 0, [schema]
    while todo and num_chars <= MAX_SCHEMA_CHARS:
        value: Any = todo.pop()
        num_chars += len(value) if isinstance(value, str) else 1
        if isinstance(value, Mapping):
            todo += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            todo += value
    if num_chars > MAX_SCHEMA_CHARS:
        raise constraint_error(
            name, f"has more than {MAX_SCHEMA_CHARS} characters, the most allowed"
        )
