"""Where templates are found, what form of content they take, and what the sandbox refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jinja2.exceptions import SecurityError

from sensorium.errors import ConfigError, InvalidRequestError
from sensorium.text.chat.rendering import REQUEST_SECONDS
from sensorium.text.chat.sandbox import MAX_SECONDS, BoundedEnvironment, render_bounded
from sensorium.text.chat.template_files import (
    compile_template,
    detect_content_format,
    find_templates,
)

LOOP = "{% for message in messages %}"
END = "{% endfor %}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (LOOP + "{{ message.content }}" + END, "string"),
        (LOOP + "{% for p in message['content'] %}{{ p.text }}{% endfor %}" + END, "openai"),
        (LOOP + "{% for p in message.content %}{{ p.text }}{% endfor %}" + END, "openai"),
        (
            LOOP + "{% set c = message.content %}{% for p in c %}{{ p }}{% endfor %}" + END,
            "openai",
        ),
        (
            LOOP
            + "{% for p in message.content | selectattr('type', 'equalto', 'image') %}"
            + "<i>{% endfor %}"
            + END,
            "openai",
        ),
        (
            "{% macro show(content, n) %}{% for p in content %}{{ p }}{% endfor %}{% endmacro %}"
            + LOOP
            + "{{ show(message.content, 1) }}"
            + END,
            "openai",
        ),
        (
            LOOP
            + "{% if message.content is string %}{{ message.content }}{% else %}"
            + "{% for p in message.content[1:] %}{{ p.text }}{% endfor %}{% endif %}"
            + END,
            "openai",
        ),
        (
            LOOP + "{% for line in message.content.split('x') %}{{ line }}{% endfor %}" + END,
            "string",
        ),
        (
            LOOP + "{% for t in tools %}{{ t }}{% endfor %}{{ message.content | trim }}" + END,
            "string",
        ),
    ],
)
def test_content_format(source: str, expected: str) -> None:
    assert detect_content_format(BoundedEnvironment().parse(source)) == expected
    assert compile_template(source, content_format="string").content_format == "string"


def test_template_files(tmp_path: Path) -> None:
    assert find_templates(tmp_path) == {}
    assert find_templates(None, fallback="F") == {"default": "F"}
    named = [{"name": "default", "template": "C"}, {"name": "tool_use", "template": "T"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert find_templates(tmp_path, fallback="F") == {"default": "C", "tool_use": "T"}
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "J"}))
    assert find_templates(tmp_path)["default"] == "J"
    (tmp_path / "chat_template.jinja").write_text("{{ 'x' }}")
    assert find_templates(tmp_path)["default"] == "{{ 'x' }}"
    given = tmp_path / "given.jinja"
    given.write_text("G")
    assert find_templates(tmp_path, override=str(given)) == {"default": "G"}
    assert find_templates(tmp_path, override="{{ 1 }}") == {"default": "{{ 1 }}"}
    with pytest.raises(ConfigError, match="neither a file nor"):
        find_templates(tmp_path, override="missing.jinja")


def test_malformed_templates() -> None:
    with pytest.raises(ConfigError, match="line 1"):
        compile_template("{% for %}")
    with pytest.raises(InvalidRequestError) as caught:
        compile_template("{% for %}", request=True)
    assert caught.value.param == "chat_template"
    with pytest.raises(InvalidRequestError, match="at most"):
        compile_template(" " * (1 << 17), request=True)


def run(source: str, seconds: float = 60.0, **variables: object) -> str:
    compiled = compile_template(source, content_format="string", plain=False)
    return render_bounded(compiled.template, variables, seconds)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for v in [range(99999)] * 99999 %}{% for w in v %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) + f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "{{ ([range(999) | list] * 99999) | map('sum') | sum }}",
    ],
)
def test_time_is_bounded(source: str) -> None:
    with pytest.raises(SecurityError, match="takes too long"):
        run(source, seconds=0.05)


DOUBLED = (
    "{% set ns = namespace(v=['a']) %}{% for i in range(60) %}"
    "{% set ns.v = [ns.v, ns.v] %}{% endfor %}"
)
BIG = "{% set big = 'a' * 1048576 %}"


@pytest.mark.parametrize(
    "source",
    [
        DOUBLED + "{{ ns.v }}",
        DOUBLED + "{{ ns.v | tojson }}",
        DOUBLED + "{{ ns.v | string | length }}",
        DOUBLED + "{{ 'x' ~ ns.v }}",
        DOUBLED + "{{ '%s' % [ns.v] }}",
        DOUBLED + "{{ '{}'.format(ns.v) }}",
        DOUBLED + "{{ ns }}",
        DOUBLED + "{% set a = ns.v %}" + DOUBLED + "{{ a == ns.v }}",
        BIG + "{{ ([big] * 1000) | join | length }}",
        BIG + "{{ ([big] * 1000) | select | join | length }}",
        BIG + "{{ ''.join([big] * 1000) | length }}",
        BIG + "{{ ''.join(([big] * 1000) | select) | length }}",
        BIG + "{{ big.replace('a', 'b' * 1000) | length }}",
        BIG + "{{ big | replace('a', 'b' * 1000) | length }}",
        BIG + "{{ ('{0}' * 1000).format(big) | length }}",
        BIG + "{% set x %}{% for i in range(9999) %}{{ big }}{% endfor %}{% endset %}",
        BIG + "{% set x = [] %}{% for i in range(9999) %}{% set y = big ~ i %}{% endfor %}",
        "{{ ('\t' * 10000).expandtabs(1000000) | length }}",
        "{{ ('\n' * 10000) | indent(1000000) | length }}",
        "{{ ([1] * 10000) | tojson(indent=1000000) | length }}",
    ],
)
def test_no_single_operation_is_huge(source: str) -> None:
    with pytest.raises(SecurityError, match=r"too long|too many"):
        render_bounded(BoundedEnvironment().from_string(source), {}, seconds=600.0)


def test_values_that_are_shared_or_hold_themselves() -> None:
    assert run("{% set a = [1] %}{{ [a, a] == [a, a] }}{{ [a, a] }}") == "True[[1], [1]]"
    assert run("{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns == ns }}") == "True"
    assert run("{{ ['a', 'b'] | select | join('-') }}{{ '+'.join('ab' | list) }}") == "a-ba+b"
    assert run("{{ 'a\nb' | indent(2) }}{{ 'aaa' | replace('a', 'b', 2) }}") == "a\n  bbba"


def test_time_of_requests_is_bounded_more_tightly() -> None:
    assert REQUEST_SECONDS < MAX_SECONDS


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ [1] * 10 ** 10 }}",
        "{{ 10 ** 10 ** 10 }}",
        (
            "{% set ns = namespace(s='aaaa') %}{% for i in range(60) %}"
            "{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
        ),
        (
            "{% set ns = namespace(s='aaaa') %}{% for i in range(60) %}"
            "{% set ns.s = ns.s + ns.s %}{% endfor %}"
        ),
        (
            "{% set ns = namespace(s='aaaa') %}{% for i in range(60) %}"
            "{% set ns.s = ns.s.replace('a', 'aa') %}{% endfor %}"
        ),
        "{{ 'a'.ljust(10 ** 12) }}",
        "{{ 'a' | center(10 ** 12) }}",
        "{{ '{:>99999999999}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 10 ** 6) }}",
        "{{ '%99999999999d' % 1 }}",
        "{{ '%*d' | format(99999999, 1) }}",
        "{% for i in range(10000) %}{{ 'a' * 100000 }}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace(__class__=1) %}{{ ns.__class__.__mro__ }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_templates_are_bounded(source: str) -> None:
    with pytest.raises(Exception, match=r".") as caught:
        run(source, messages=[])
    assert not isinstance(caught.value, MemoryError)


def test_what_templates_in_the_field_use() -> None:
    assert run("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert run("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"
    assert len(run("{{ strftime_now('%Y') }}")) == 4
    assert run("{% generation %}hi{% endgeneration %}") == "hi"
    assert (
        run("{% for x in [1, 2, 3] %}{{ x }}{% if x == 2 %}{% break %}{% endif %}{% endfor %}")
        == "12"
    )
    assert run("{% set ns = namespace(n=0) %}{% set ns.n = 2 %}{{ ns.n }}") == "2"
    assert (
        run("{{ '{}-{a:>4}'.format(1, a=2) }}{{ '%s' % 'x' }}{{ '%s' | format(1) }}") == "1-   2x1"
    )
    assert (
        run("{% for m in ms %}{{ loop.index }}/{{ loop.length }} {% endfor %}", ms=[1, 2])
        == "1/2 2/2 "
    )
    assert run("{{ dict(a=1)['a'] ~ 'b' ~ 2 }}") == "1b2"
    assert run("{% for k, v in d.items() %}{{ k }}{{ v }}{% endfor %}", d={"a": 1}) == "a1"
    assert run("{% if x is defined %}1{% else %}0{% endif %}\n") == "0"


def test_large_values_are_no_widths() -> None:
    """Only what sets the size of a result is bounded; a timestamp is printed like any other number."""
    then = 1_700_000_000
    assert run("{{ v | tojson }} {{ v | string }} {{ v ~ '' }} {{ '%d' % v }}", v=then) == (
        f"{then} {then} {then} {then}"
    )
    show = "{% macro show(v) %}{{ v }}{% endmacro %}{{ show(v) }} {{ namespace(a=v).a }}"
    assert run(show, v=then) == f"{then} {then}"
