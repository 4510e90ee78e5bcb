"""Expansion of placeholders in a prompt to the tokens that the items' embeddings fill.

Example: with ``<image>`` as token 9 and an image of three embeddings, ``[1, 9, 5]`` becomes ``[1,
    9, 9, 9, 5]`` with one item whose runs are ``((1, 3),)``. All work is linear in the lengths of
    prompt and result: token ids are packed into a ``str`` of one character per id, which Python
    searches in linear time for any pattern.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

from sensorium.errors import PlaceholderMismatchError, counted
from sensorium.multimodal.items import MODALITIES, MediaItem, Modality
from sensorium.multimodal.processor import Markup, PlacedItem, Processor, Replacement

_NO_ID = 0x10FFFF
"""Replaces ids that no character can hold; such an id is no placeholder."""
_MARKERS = _NO_ID - len(MODALITIES)
"""Ids from here on are markers of placeholders, not tokens."""
_MAX_DIGITS = 9
_LISTED = 8


def marker(modality: Modality) -> int:
    """Return an id outside all vocabularies, for placeholders that are not single tokens."""
    return _NO_ID - 1 - MODALITIES.index(modality)


class PlaceholderIds:
    """Finds the placeholders of a ``Markup`` in text. Immutable."""

    def __init__(self, processor: Processor, markup: Markup) -> None:
        self.prefix_each = markup.prefix_each
        self._patterns = {m: re.compile(text) for m, text in markup.patterns.items()}
        self._ids = {modality: processor.placeholder(modality) for modality in self._patterns}

    def read(self, text: str) -> NumberedPlaceholder | None:
        """Parse a text that is one placeholder; None for other texts.

        Raises PlaceholderMismatchError for a number that no item can have.
        """
        for modality, pattern in self._patterns.items():
            hit = pattern.fullmatch(text)
            if hit is not None:
                return self._placeholder(modality, hit)
        return None

    def split(
        self, text: str, most: int | None = None
    ) -> tuple[list[str], list[NumberedPlaceholder]]:
        """Return the pieces of text around placeholders, and the placeholders, one fewer.

        After ``most`` placeholders the rest is the last piece. Raises PlaceholderMismatchError for
        a number that no item can have.
        """
        found_by = [zip(pattern.finditer(text), repeat(m)) for m, pattern in self._patterns.items()]
        text_pieces: list[str] = []
        found: list[NumberedPlaceholder] = []
        end = 0
        for hit, modality in heapq.merge(*found_by, key=lambda pair: pair[0].start()):
            if hit.start() < end:
                continue
            if len(found) == most:
                break
            text_pieces.append(text[end : hit.start()])
            found.append(self._placeholder(modality, hit))
            end = hit.end()
        return [*text_pieces, text[end:]], found

    def _placeholder(self, modality: Modality, hit: re.Match[str]) -> NumberedPlaceholder:
        digits = hit.groupdict().get("number")
        if digits is not None and len(digits) > _MAX_DIGITS:
            raise PlaceholderMismatchError(
                f"A placeholder names the {modality} {digits[:_MAX_DIGITS]}…, a number of "
                f"{len(digits)} digits; items are numbered from 1."
            )
        number = None if digits is None else int(digits)
        return NumberedPlaceholder(modality, self._ids[modality], number)


@dataclass(frozen=True, slots=True)
class NumberedPlaceholder:
    """A placeholder found in text: its ids, and the number of its item (from 1), if any."""

    modality: Modality
    ids: tuple[int, ...]
    number: int | None


def in_order(
    items: Sequence[MediaItem], placeholders: Sequence[NumberedPlaceholder], processor: Processor
) -> list[MediaItem]:
    """Order items as their numbered placeholders, an item of two placeholders twice; others follow.

    Raises PlaceholderMismatchError unless each item is named at least once and no other number is.
    """
    ordered: list[MediaItem] = []
    numbered = {p.modality for p in placeholders if p.number is not None}
    for modality in sorted(numbered):
        own = [item for item in items if item.modality == modality]
        numbers = _numbers(modality, placeholders)
        _check_numbers(modality, numbers, len(own), processor)
        ordered += [own[number - 1] for number in numbers]
    return [*ordered, *(item for item in items if item.modality not in numbered)]


def _numbers(modality: Modality, placeholders: Sequence[NumberedPlaceholder]) -> list[int]:
    """Return the numbers of the items that the placeholders of a modality name, in their order."""
    return [p.number for p in placeholders if p.modality == modality and p.number is not None]


def _check_numbers(
    modality: Modality, numbers: Sequence[int], num_items: int, processor: Processor
) -> None:
    """Raise PlaceholderMismatchError unless each item is named and no other number is."""
    if set(numbers) == set(range(1, num_items + 1)):
        return
    known = sorted(set(numbers))
    named = ", ".join(map(str, known[:_LISTED])) + (" …" if len(known) > _LISTED else "")
    items = counted(num_items, f"{modality} item")
    hint = _hint(modality, num_items, processor)
    raise PlaceholderMismatchError(
        f"The prompt's {modality} placeholders name the items {named}, but there "
        f"{'is' if num_items == 1 else 'are'} {items}: name each of 1 to {num_items} at least "
        "once.",
        hint,
    )


@dataclass(frozen=True, slots=True)
class Expansion:
    """A prompt with its placeholders expanded, and its items in their order there.

    ``num_item_tokens`` counts the positions that each modality with items fills.
    """

    token_ids: tuple[int, ...]
    items: tuple[PlacedItem, ...]
    num_item_tokens: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Site:
    """A slice of the prompt that the expansion of one item replaces."""

    start: int
    length: int
    item: MediaItem
    replacement: Replacement


def check_counts(
    token_ids: Sequence[int],
    least: Mapping[Modality, int],
    uncertain: Collection[Modality],
    numbered: Sequence[NumberedPlaceholder],
    processor: Processor,
) -> None:
    """Refuse a prompt whose placeholders cannot fit its items, before these are loaded.

    ``least`` holds the number of items of each modality; of those in ``uncertain``, such as
    embeddings that were not read yet, there may be more. Tokens that could be a placeholder in full
    length pass. Raises PlaceholderMismatchError.
    """
    prompt = _pack(token_ids)
    for modality in processor.modalities:
        num_items, exact = least.get(modality, 0), modality not in uncertain
        placeholder, fill = _pack(processor.placeholder(modality)), processor.fill(modality)
        found = prompt.count(placeholder)
        numbers = _numbers(modality, numbered)
        if numbers and exact and num_items:
            _check_numbers(modality, numbers, num_items, processor)
        elif numbers and num_items:
            continue
        elif num_items == 0:
            if found:
                raise mismatch(modality, found, 0, processor)
        elif fill is not None:
            kind = _pack((fill,))
            spare = prompt.count(kind) - found * placeholder.count(kind)
            if found + spare < num_items or (
                exact and found > num_items and _are_short(prompt, placeholder, kind, spare)
            ):
                raise mismatch(modality, found, num_items, processor)


def _are_short(prompt: str, placeholder: str, fill: str, spare: int) -> bool:
    """Return whether no placeholder can be part of one in full length."""
    if ord(placeholder[0]) >= _MARKERS:
        return True
    if fill not in placeholder:
        return spare == 0
    return len(placeholder) == 1 and spare == 0 and placeholder * 2 not in prompt


def expand(token_ids: Sequence[int], items: Sequence[MediaItem], processor: Processor) -> Expansion:
    """Expand the placeholders of ``token_ids``, in order of the items of each modality.

    A placeholder that is in full length already is kept. Raises PlaceholderMismatchError, with both
    counts, if a modality has more or fewer placeholders than items.
    """
    prompt = _pack(token_ids)
    sites: list[_Site] = []
    for modality in processor.modalities:
        own = [item for item in items if item.modality == modality]
        replacements = [
            processor.replacement(item.features, number) for number, item in enumerate(own)
        ]
        found = _find_sites(prompt, modality, processor, replacements)
        sites.extend(
            _Site(start, length, item, replacement)
            for (start, length), item, replacement in zip(found, own, replacements, strict=True)
        )
    sites.sort(key=lambda site: site.start)
    return _assemble(token_ids, sites)


def _find_sites(
    prompt: str,
    modality: Modality,
    processor: Processor,
    replacements: Sequence[Replacement],
) -> list[tuple[int, int]]:
    """Return ``(start, length)`` of the tokens that each replacement stands for, in order."""
    placeholder = _pack(processor.placeholder(modality))
    fulls = [_pack(replacement.token_ids) for replacement in replacements]
    count = prompt.count(placeholder)
    sites: list[tuple[int, int]] = []
    search = _Search(prompt)
    pos = 0
    for full in fulls:
        short_at = search.find(placeholder, pos)
        # With as many placeholders as items none is in full length, unless both forms look alike.
        may_be_full = count != len(fulls) or full.count(placeholder) == 1
        full_at = search.find(full, pos) if may_be_full else -1
        if full_at != -1 and (short_at == -1 or full_at <= short_at):
            sites.append((full_at, len(full)))
        elif short_at != -1:
            sites.append((short_at, len(placeholder)))
        else:
            raise mismatch(modality, len(sites), len(fulls), processor, map(len, fulls))
        pos = sum(sites[-1])
    rest = prompt.count(placeholder, pos)
    if rest:
        raise mismatch(modality, len(sites) + rest, len(fulls), processor, map(len, fulls))
    return sites


class _Search:
    """Finds patterns from a growing position, without searching a part of the text twice."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._next: dict[str, int] = {}

    def find(self, pattern: str, start: int) -> int:
        """Return the first index of ``pattern`` at or after ``start``; -1 if there is none."""
        at = self._next.get(pattern)
        if at is None or -1 < at < start:
            at = self._next[pattern] = self._text.find(pattern, start)
        return at


def mismatch(
    modality: Modality,
    num_found: int,
    num_items: int,
    processor: Processor,
    lengths: Iterable[int] = (),
) -> PlaceholderMismatchError:
    """Return the error for so many placeholders and items, with the model's placeholder.

    ``lengths`` are the tokens of each item's placeholder in full length, if known.
    """
    found = counted(num_found, f"{modality} placeholder")
    items = counted(num_items, f"{modality} item")
    hint = _hint(modality, num_items, processor)
    known = sorted(set(lengths))
    if hint and known:
        tokens = ", ".join(map(str, known[:8]))
        hint += f" The placeholder in full length ({tokens} tokens) will do as well."
    return PlaceholderMismatchError(f"The prompt has {found} for {items}.", hint)


def _hint(modality: Modality, num_items: int, processor: Processor) -> str:
    """Return a sentence that names the placeholder; the first two if they are numbered."""
    if num_items == 0:
        return f"Pass the {modality} in multi_modal_data, or leave the placeholder out."
    first, second = (processor.placeholder_text(modality, number) for number in (1, 2))
    if first == second:
        return f"Write {first!r} where each {modality} goes."
    more = f", {second!r} for the second" if num_items > 1 else ""
    return f"Write {first!r} for the first {modality}{more}."


def _assemble(token_ids: Sequence[int], sites: Sequence[_Site]) -> Expansion:
    out: list[int] = []
    placed: list[PlacedItem] = []
    counts: Counter[str] = Counter()
    joins: Mapping[tuple[int, int], int] = {}
    pos = 0
    for site in sites:
        if site.start < pos:
            raise PlaceholderMismatchError(
                "Placeholders of two modalities overlap in the prompt; write them one after "
                "another."
            )
        _append(out, token_ids[pos : site.start], joins)
        ids = site.replacement.token_ids
        joins = site.replacement.joins if site.length != len(ids) else {}
        base = _append(out, ids, joins)
        runs = tuple((base + start, length) for start, length in site.replacement.runs)
        placed.append(PlacedItem(site.item, runs))
        counts[site.item.modality] += sum(length for _, length in runs)
        pos = site.start + site.length
    _append(out, token_ids[pos:], joins)
    return Expansion(tuple(out), tuple(placed), dict(counts))


def _append(out: list[int], ids: Sequence[int], joins: Mapping[tuple[int, int], int]) -> int:
    """Append ``ids``; join the first with the last before it where ``joins`` says so.

    Returns the position of the first of ``ids``.
    """
    one = joins.get((out[-1], ids[0])) if joins and out and ids else None
    if one is not None:
        out[-1] = one
        ids = ids[1:]
    base = len(out) - (one is not None)
    out.extend(ids)
    return base


def _pack(token_ids: Iterable[int]) -> str:
    ids = token_ids if isinstance(token_ids, tuple | list) else tuple(token_ids)
    try:
        return "".join(map(chr, ids))
    except (ValueError, OverflowError):
        return "".join(chr(i) if 0 <= i < _NO_ID else chr(_NO_ID) for i in ids)
