"""Limits on the media items of a prompt: modalities that the model takes, and numbers of items."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sensorium.config import MediaConfig
from sensorium.errors import TooManyItemsError, UnsupportedModalityError, counted
from sensorium.multimodal.items import MediaRef, Modality


def check_modality(ref: MediaRef, known: Sequence[Modality], config: MediaConfig) -> None:
    """Raise UnsupportedModalityError unless a model of modalities ``known`` takes this item here.

    A limit of 0 switches a modality's encoder off, which precomputed embeddings do not need.
    """
    offered = [modality for modality in known if config.limit(modality) != 0]
    is_embeds = ref.kind == "embeds" and config.enable_mm_embeds
    if ref.modality in (known if is_embeds else offered):
        return
    why = (
        f"is switched off here by limit_mm_per_prompt ({ref.modality}: 0)"
        if ref.modality in known
        else "is not something this model takes"
    )
    raise UnsupportedModalityError(
        f"{ref.modality} {why}; it takes: {', '.join(offered) or 'text only'}.",
        param=ref.param or None,
    )


def check_counts(
    items: Sequence[tuple[Modality, bool]], refs: Sequence[MediaRef], config: MediaConfig
) -> None:
    """Raise TooManyItemsError at the place of the first item beyond a limit.

    ``items``: modality of each, and whether it holds precomputed embeddings.
    """
    counts = Counter(
        modality
        for modality, precomputed in items
        if not (precomputed and config.limit(modality) == 0)
    )
    for modality, count in counts.items():
        limit = config.limit(modality)
        if limit is not None and count > limit:
            beyond = [ref for ref in refs if ref.modality == modality][limit:]
            raise TooManyItemsError(
                f"The prompt has {counted(count, f'{modality} item')}; at most {limit} "
                f"{'is' if limit == 1 else 'are'} allowed (--limit-mm-per-prompt).",
                param=beyond[0].param if beyond else None,
            )
    most = config.max_items_per_request
    if len(items) > most:
        raise TooManyItemsError(
            f"The request has {len(items)} media items; at most {most} are allowed "
            "(--max-items-per-request).",
            param=refs[most].param if len(refs) > most else None,
        )
