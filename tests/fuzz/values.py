"""Values for the fields of requests: right ones, wrong ones, and texts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tests.fuzz.mutation import INTERESTING

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}

GOOD: dict[str, tuple[Any, ...]] = {
    "stream": (True,),
    "n": (1, 2, 3),
    "seed": (0, 7, -1),
    "temperature": (0, 0.7, 2.0),
    "top_p": (0.1, 1.0),
    "top_k": (1, 5, -1),
    "min_p": (0.0, 0.5, 1.0),
    "stop": ("red", ["a", "b"]),
    "logit_bias": ({"5": 100.0}, {"5": -100, "6": 1.5}),
    "logprobs": (True,),
    "prompt_logprobs": (0, 3),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (1.0,),
    "repetition_penalty": (0.5, 1.3),
    "ignore_eos": (True,),
    "bad_words": (["red"],),
    "return_token_ids": (True,),
    "response_format": (
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    ),
    "structured_outputs": ({"choice": ["red", "blue"]}, {"regex": "[a-z]{1,5}"}),
    "cache_salt": ("a", "b"),
    "media_io_kwargs": ({"image": {"rgba_background_color": [1, 2, 3]}},),
    "mm_processor_kwargs": ({"max_pixels": 15000},),
    "user": ("somebody",),
    "priority": (-5, 5),
}
"""Values that are right, of fields that both chats and completions have."""

WRONG: tuple[Any, ...] = (
    *(None, True, False, "", "x", "1", "\x00", 0, -1, 1, 2, 20, 21, 64, 1.5, -0.0, 0.0),
    *(1e-320, 1e308, -1e308, [], {}, [[]], [None], [""], ["x"], [-1], [1 << 31], [1 << 70]),
    *({"": ""}, {"a": {"b": {"c": [1, {"d": None}]}}}, {"type": "x"}, {"image": None}),
    *("a" * 3000, ["b"] * 300, [0] * 3000),
)
REGEXES = (
    *(
        "(a+)+$",
        "a{1,100000}",
        "(?=a)b",
        "[",
        "\\1",
        "(a|a)*" * 30,
        ".*" * 100,
        "\\p{Lu}",
        "x" * 5000,
    ),
    *("((((((((((a)*)*)*)*)*)*)*)*)*)*", "[\ud800]", "^$", "a{999999999}", "(?i)abc", ""),
)
SCHEMAS: tuple[Any, ...] = (
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    {"$ref": "http://127.0.0.1/x.json"},
    {"type": "string", "pattern": "(a+)+$"},
    {"type": "string", "minLength": 10**9},
    {"type": "array", "minItems": 10**6, "items": {}},
    {"enum": []},
    {"enum": [str(i) for i in range(3000)]},
    {"allOf": [{"type": "object"}] * 200},
    {"anyOf": [{"type": "object", "properties": {str(i): {}}} for i in range(200)]},
    {"type": "nothing"},
    {"properties": {str(i): {"type": "integer"} for i in range(400)}, "type": "object"},
    {"type": "integer", "minimum": 10**30, "maximum": 10**31},
    {"type": "number", "multipleOf": 1e-300},
    {"not": {}},
    False,
    {"const": "\ud800"},
    {},
)
WORDS = (
    "What",
    "is",
    "shown?",
    "red",
    "circle",
    "a",
    "the",
    "left",
    "7",
    "é",
    "字",
    "🙂",
    "\n",
    "\t",
)
ODD_TEXTS = (
    *(
        "",
        " ",
        "\x00",
        "\x00\x01\x02",
        "\ufeff",
        "\u202e",
        "a\u0300" * 50,
        "\U0010ffff",
        "🧑‍🚀" * 20,
    ),
    *("{{ 7 * 7 }}", "{% for i in range(10**9) %}{% endfor %}", "<image>" * 40, "%s%n", "'\"`"),
)


class Values:
    """Draws values from a generator."""

    def __init__(self, rng: random.Random, special_tokens: Sequence[str]) -> None:
        self._rng = rng
        self._special_tokens = tuple(special_tokens)

    def any(self) -> Any:
        """Anything that JSON can hold."""
        rng = self._rng
        way = rng.randrange(8)
        if way == 0:
            return rng.choice(INTERESTING) * rng.choice((1, 1, -1))
        if way == 1:
            return self._nested(rng.choice((3, 30, 70, 150)))
        if way == 2:
            return self.text()
        return rng.choice(WRONG)

    def of(self, name: str) -> Any:
        """A value for the field ``name``: often one that comes near to what is right."""
        rng = self._rng
        special = getattr(self, f"_{name}", None)
        if special is not None and rng.random() < 0.7:
            return special()
        if name in GOOD and rng.random() < 0.3:
            return rng.choice(GOOD[name])
        return self.any()

    def name(self) -> str:
        """A name of a field, mostly one that is nearly known."""
        return self._rng.choice(
            ("max_token", "Messages", "", "__class__", "a.b", "\x00", "é", "n ")
        )

    def role(self) -> Any:
        """A role of a message."""
        roles = ("system", "user", "assistant", "developer", "tool", "user", "assistant")
        return self._rng.choice(roles) if self._rng.random() < 0.95 else self.any()

    def text(self) -> str:
        """A text: words, special tokens, odd characters, now and then very long."""
        rng = self._rng
        way = rng.random()
        if way < 0.5:
            return " ".join(rng.choices(WORDS, k=rng.randrange(1, 9)))
        if way < 0.75:
            tokens = rng.choices((*self._special_tokens, *WORDS), k=rng.randrange(1, 12))
            return "".join(tokens)
        if way < 0.97:
            return rng.choice(ODD_TEXTS)
        unit = rng.choice(("a", "a ", "\n", "字", *self._special_tokens))
        return unit * rng.choice((1000, 20_000, 100_000))

    def prompt(self) -> Any:
        """A prompt of a completion."""
        rng = self._rng
        ids = [rng.randrange(1344) for _ in range(rng.randrange(1, 20))]
        odd = (
            [],
            [[]],
            [ids, self.text()],
            [rng.choice(INTERESTING)],
            {},
            None,
            [True],
            ["x"] * 40,
        )
        return rng.choice(
            (self.text(), self.text(), self.text(), ids, [ids, ids[:1]], rng.choice(odd))
        )

    def uuid(self) -> Any:
        """An id for an item; few of them, so that some are known."""
        if self._rng.random() < 0.1:
            return self._rng.choice(("", 5, "x" * 2000, "\x00", "\ud800", None, ["a"], "é"))
        return f"item-{self._rng.randrange(12)}"

    def forbidden_url(self) -> str:
        """A URL that is refused without a connection."""
        urls = (
            *(
                "http://127.0.0.1:1/x.png",
                "http://localhost/x",
                "http://[::1]/",
                "http://0x7f000001/",
            ),
            *(
                "http://2130706433/a.jpg",
                "http://169.254.169.254/latest",
                "https://10.0.0.1/",
                "//x",
            ),
            *(
                "http://[::ffff:127.0.0.1]/",
                "http://a@127.0.0.1/",
                "http://a\\@10.0.0.1/",
                "http:///x",
            ),
            *(
                "file:///etc/passwd",
                "/etc/passwd",
                "../../etc/passwd",
                "file://%2e%2e/x",
                "C:\\x.png",
            ),
            *(
                "ftp://127.0.0.1/x",
                "gopher://127.0.0.1:1/_x",
                "javascript:1",
                "http://",
                "http://[",
                "",
            ),
            *("http://127.0.0.1:99999/", "http://\x00/", "data:", "data:image/png", "x" * 70_000),
            *("http://0/", "http://100.64.0.1/", "http://224.0.0.1/", "https://[fe80::1%25eth0]/"),
        )
        return self._rng.choice(urls)

    def tool_talk(self) -> dict[str, Any]:
        """A call of a tool, or what it said."""
        rng = self._rng
        if rng.random() < 0.5:
            return {"role": "tool", "tool_call_id": "c1", "content": self.text()}
        arguments = rng.choice(('{"a": 1}', "{", "[]", "null", "[" * 2000, self.text()))
        call = {
            "id": "c1",
            "type": "function",
            "function": {"name": "look", "arguments": arguments},
        }
        return {"role": "assistant", "tool_calls": [call]}

    def _nested(self, depth: int) -> Any:
        value: Any = 1
        for _ in range(depth):
            value = [value] if self._rng.random() < 0.5 else {"a": value}
        return value

    # --- fields, by their names -------------------------------------------------------------------

    def _n(self) -> Any:
        return self._rng.choice((0, -1, 1, 2, 8, 16385, 10**9, 1 << 63, 1 << 70, "2", 1.0, True))

    def _max_tokens(self) -> Any:
        return self._rng.choice((0, -1, 1, 64, 2000, 1 << 31, 1 << 32, 1 << 70, "6", 1.5))

    _max_completion_tokens = _max_tokens

    def _logprobs(self) -> Any:
        return self._rng.choice((True, False, 0, 1, 20, 21, -1, 10**9))

    _top_logprobs = _prompt_logprobs = _logprobs

    def _logit_bias(self) -> Any:
        options = ({"-1": 1}, {"99999999": 1}, {"x": 1}, {"5": 101}, {"5": "1"}, {"1" * 5000: 1})
        return self._rng.choice((*options, {str(i): 1 for i in range(1344)}, {str(1 << 70): 0}))

    def _stop(self) -> Any:
        return self._rng.choice(("", [""], ["a"] * 65, ["x" * 1025], "\x00", ["\ud800"], [1]))

    def _stop_token_ids(self) -> Any:
        return self._rng.choice(([5], [-1], [1 << 40], [1344], [1343], list(range(1300)), [0.5]))

    _allowed_token_ids = _tokens = _stop_token_ids

    def _structured_outputs(self) -> Any:
        rng = self._rng
        options = (
            {"regex": rng.choice(REGEXES)},
            {"json": rng.choice(SCHEMAS)},
            {"json": "{"},
            {"choice": [self.text() for _ in range(3)]},
            {"choice": ["a" * 5000] * 50},
            {"grammar": rng.choice(("start: ", 'start: "a" start', "?", 'start: "a"', "x" * 9000))},
            {"regex": "a", "json": {}},
            {"json_object": True},
            {"nothing": 1},
        )
        return rng.choice(options)

    def _response_format(self) -> Any:
        rng = self._rng
        schema = {"name": self.text(), "schema": rng.choice(SCHEMAS), "strict": True}
        types = ("json_schema", "json_object", "text", "xml", None)
        return {"type": rng.choice(types[:1] * 4 + types), "json_schema": schema}

    def _tools(self) -> Any:
        rng = self._rng
        function = {"name": self.text(), "parameters": rng.choice(SCHEMAS)}
        named = {"type": "function", "function": function}
        return rng.choice(([TOOL], [TOOL] * 3, [named], [named] * 200, [{}], [], [{"type": "x"}]))

    def _tool_choice(self) -> Any:
        named = {"type": "function", "function": {"name": self._rng.choice(("look", "x", ""))}}
        return self._rng.choice(("auto", "none", "required", "any", named, {}))

    def _mm_processor_kwargs(self) -> Any:
        rng = self._rng
        number = rng.choice(INTERESTING) * rng.choice((1, 1, -1))
        names = (
            "min_pixels",
            "max_pixels",
            "size",
            "num_crops",
            "max_slice_nums",
            "fps",
            "num_frames",
        )
        sizes = {"shortest_edge": number, "longest_edge": rng.choice(INTERESTING)}
        options = {name: rng.choice((number, sizes, self.any())) for name in rng.sample(names, 2)}
        return rng.choice(
            (options, {"size": sizes}, {"min_pixels": number}, {"max_pixels": number})
        )

    def _media_io_kwargs(self) -> Any:
        rng = self._rng
        number = rng.choice((*INTERESTING, -1, 0.5, 1e-300, 1e300, "2"))
        options = (
            {"video": {"num_frames": number}},
            {"video": {"fps": number}},
            {"video": {"fps": number, "num_frames": rng.choice(INTERESTING)}},
            {"image": {"rgba_background_color": [number, 0, 0]}},
            {"image": {"rgba_background_color": self.any()}},
            {"audio": {"x": 1}},
            {"nothing": {}},
            {"image": self.any()},
        )
        return rng.choice(options)

    def _chat_template_kwargs(self) -> Any:
        return {self.name(): self.any(), "add_vision_id": True}

    def _chat_template(self) -> Any:
        return self._rng.choice(
            ("{{ messages }}", "{% for i in range(10**9) %}x{% endfor %}", "{{")
        )

    def _request_id(self) -> Any:
        return self._rng.choice(("id", "a b", "x" * 129, "\n", "é", "same", "same"))

    def _priority(self) -> Any:
        return self._rng.choice((0, -(1 << 31), (1 << 31) + 1, 1 << 70, -1, 1.0))

    def _cache_salt(self) -> Any:
        return self._rng.choice(("", "a", "x" * 1025, "\ud800", "\x00"))

    def _stream_options(self) -> Any:
        return self._rng.choice(({"include_usage": True}, {"x": 1}, {"continuous_usage_stats": 1}))

    def _messages(self) -> Any:
        rng = self._rng
        message = {"role": self.role(), "content": self.any()}
        odd = (
            [],
            [{}],
            [None],
            [message],
            [message] * 3,
            "x",
            {},
            [{"role": "user", "content": []}],
        )
        return rng.choice((*odd, [{"role": "user", "content": "Hi", "name": self.any()}]))

    def _input(self) -> Any:
        return self._rng.choice((self.prompt(), ["x"] * 300, [[1], [2, 3]], 5))

    def _encoding_format(self) -> Any:
        return self._rng.choice(("float", "base64", "int8", "", 1))
