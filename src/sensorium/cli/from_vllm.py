"""docs/from_vllm.md, generated from the tables by which vLLM's names are read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sensorium.cli.flags import flag_of
from sensorium.cli.rewrite import SHORT
from sensorium.compat.calls import CALL_KEYWORDS
from sensorium.compat.engine_flags import ENGINE_RULES
from sensorium.compat.fields import FIELD_RULES
from sensorium.compat.paths import PATHS
from sensorium.compat.rule import Effect, Rule
from sensorium.compat.server_flags import SERVER_RULES
from sensorium.compat.values import REFUSED_VALUES, SAME_VALUES

_INTRODUCTION = """# From vLLM

What vLLM's flags, keywords, fields of requests and paths do here: those of its version 0.33, and
those of 2024 and 2025 that it has dropped since. This page is generated from the tables in
`sensorium.compat` by `scripts/from_vllm_docs`; edit the tables, not the page.

`vllm serve MODEL ...` becomes `sensorium serve MODEL ...`, `from vllm import LLM, SamplingParams`
becomes `from sensorium import LLM, SamplingParams`. Flags of the engine are keywords of `LLM(...)`,
too, with the same effect.

- Names that both have are listed in `configuration.md`; None leaves a keyword at its default.
- Flags may be written `--max_model_len`, `--max-model-len=8K` (8192; `8k` is 8000),
  `--no-enable-prefix-caching` or `--disable-prefix-caching`, and members of a flag that takes JSON
  `--limit-mm-per-prompt.image 2`.
- `--config FILE.yaml` has flags as its keys; flags on the command line override the file.
- Flags without effect are accepted, with one warning on stderr (a `UserWarning` of `LLM`). Flags
  that are not supported stop the start with the reason, unless their value is vLLM's default.
- `VLLM_API_KEY`, `VLLM_IMAGE_FETCH_TIMEOUT`, `VLLM_VIDEO_FETCH_TIMEOUT`, `VLLM_AUDIO_FETCH_TIMEOUT`
  and `VLLM_MEDIA_URL_ALLOW_REDIRECTS` are read where our own variables are unset. The log of a
  server names other variables of vLLM that are set, because they have no effect.
- The server listens on 127.0.0.1 unless `--host` is given; vLLM's listens on all addresses.
- `--metrics-prefix vllm:` gives metrics vLLM's names.
"""

_FIELDS = """null is accepted for every field, and so are values that ask for what is done in any
case. Errors name the field that was sent."""


def from_vllm_markdown() -> str:
    """Return the whole page."""
    rules = [*ENGINE_RULES.values(), *SERVER_RULES.values()]
    flags = (*_flags(rules), *_short_flags(), *_values())
    return "\n".join([_INTRODUCTION, *flags, *_calls(), *_fields(), *_paths()])


def _flags(rules: Sequence[Rule]) -> Iterable[str]:
    same = [rule for rule in rules if rule.effect is Effect.SAME]
    rows = [(_code(flag_of(r.name)), _ours(r.to), r.why) for r in same]
    yield from table(
        "Flags with the same effect under another name", ("vLLM", "here", "meaning"), rows
    )
    yield from _by_reason("Flags without effect", "why", Effect.IGNORED, rules)
    yield from _by_reason(
        "Flags that are not supported", "why, and what to do", Effect.REFUSED, rules
    )


def _ours(to: str) -> str:
    name, _, rest = to.partition(" ")
    return f"{_code(flag_of(name))} {rest}".strip()


def _by_reason(title: str, heading: str, effect: Effect, rules: Sequence[Rule]) -> Iterable[str]:
    names: dict[str, list[str]] = {}
    for rule in rules:
        if rule.effect is effect:
            names.setdefault(rule.why, []).append(_code(flag_of(rule.name)))
    rows = [(", ".join(flags), why) for why, flags in names.items()]
    yield from table(title, ("vLLM", heading), rows)


def _short_flags() -> Iterable[str]:
    rows = [(_code(short), _code(long)) for short, long in SHORT.items()]
    rows.append((_code("-O3"), _code("--optimization-level 3")))
    yield from table("Short flags", ("vLLM", "stands for"), rows)


def _values() -> Iterable[str]:
    rows = [
        (_code(flag_of(option)), _code(value), "the default" if ours is None else _code(ours))
        for option, values in SAME_VALUES.items()
        for value, ours in values.items()
    ]
    for option, values in REFUSED_VALUES.items():
        for why in dict.fromkeys(values.values()):
            refused = ", ".join(_code(value) for value, reason in values.items() if reason == why)
            rows.append((_code(flag_of(option)), refused, f"not supported: {why}"))
    yield from table("Values of flags that both have", ("flag", "vLLM", "here"), rows)


def _calls() -> Iterable[str]:
    title = "Keywords of `LLM.generate`, `chat`, `embed` and `encode`"
    rows = [(_code(name), instead) for name, instead in CALL_KEYWORDS.items()]
    head = ("vLLM (None, {} and [] pass)", "why it is not supported, or what to do instead")
    yield from table(title, head, rows)


def _fields() -> Iterable[str]:
    yield from ("## Fields of requests", "", _FIELDS, "")
    rules = FIELD_RULES.values()
    rows = [
        (_code(r.name), f"{_code(r.to)}: {r.why}" if r.to else f"{r.effect.value}: {r.why}")
        for effect in Effect
        for r in rules
        if r.effect is effect
    ]
    yield from rows_of(("vLLM", "here"), rows)


def _paths() -> Iterable[str]:
    rows = [(_code(path), instead) for path, instead in PATHS.items()]
    yield from table(
        "Paths that do not exist here", ("path, and those below it", "what to do"), rows
    )


def _code(text: str) -> str:
    return f"`{text}`"


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    """Yield the lines of a section with one table."""
    yield from (f"## {title}", "")
    yield from rows_of(head, rows)


def rows_of(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    """Yield the lines of a table."""
    yield from (_row(head), _row(["---"] * len(head)))
    yield from (_row([cell.replace("|", "\\|") for cell in cells]) for cells in rows)
    yield ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
