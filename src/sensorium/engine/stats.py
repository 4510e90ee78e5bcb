"""Gauges and counters of a running engine, and the facts it found at its start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(slots=True)
class EncoderStats:
    """Gauges and counters of a replica that encodes media apart from engines.

    Attributes:
        num_waiting: Items that wait or are being encoded.
        num_items: Items encoded since its start, in ``seconds``, to embeddings of ``num_bytes``.
        num_failed: Items that could not be encoded.
        weight_bytes: Memory of the weights of its linear layers.
    """

    num_waiting: int = 0
    num_items: int = 0
    num_failed: int = 0
    seconds: float = 0.0
    num_bytes: int = 0
    weight_bytes: int = 0


@dataclass(frozen=True, slots=True)
class EncodersApart:
    """Counters of all replicas that encode media apart, by name, and of who asks them.

    Attributes:
        replicas: What each said last.
        fallbacks: Items that engines had to encode, by reason.
        num_refused: Items that were refused because encoders ended with them.
    """

    replicas: Mapping[str, EncoderStats] = field(default_factory=dict)
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    num_refused: int = 0


@dataclass(slots=True)
class EngineStats:
    """A snapshot of gauges and counters.

    ``num_ranks``, ``num_running``, ``num_waiting``, ``kv_blocks_*``, ``held_features``,
    ``encoder_resident_embeds``, ``encoder_num_bytes``, ``encoder_capacity_bytes`` and all about
    adapters are gauges; the others count from the start of the engine.

    Attributes:
        num_ranks: Processes that compute the model together.
        num_deferred: Those of ``num_waiting`` that wait for their grammar.
        waiting_tokens: Tokens of prompts, running or waiting, that are still to be computed.
        prefix_queries: Prompt tokens looked up in the prefix cache; ``prefix_hits`` were found.
        encoder_queries: Items looked up in the encoder cache; all ``encoder_*`` are about that
            cache, ``encode_*`` about running encoders.
        prompt_tokens: Prompt tokens, counted for each sample.
        item_tokens: Those that items fill, by modality.
        iteration_counts: Steps by their tokens, in the buckets of
            ``metrics.families.ITERATION_TOKENS``; ``iteration_tokens`` is the sum of the tokens.
        num_drafts: Spans that tried ``num_draft_tokens``, of which ``num_accepted_tokens`` were
            right; ``num_accepted_at`` has those by their place among the tried ones.
        media: Counters of the media pipeline, by name.
        max_loras: Most adapters that are loaded; 0 where there are none. ``running_adapters`` and
            ``waiting_adapters`` are names; of those with equal content all.
        num_engine_restarts: Restarts since the start of the server; 0 in the engine itself.
    """

    num_ranks: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_deferred: int = 0
    waiting_tokens: int = 0
    block_size: int = 0
    cache_dtype: str = ""
    enable_prefix_caching: bool = True
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    encoder_queries: int = 0
    encoder_hits: int = 0
    encoder_items: int = 0
    encoder_resident_embeds: int = 0
    encoder_num_bytes: int = 0
    encoder_capacity_bytes: int = 0
    encoder_evictions: int = 0
    encode_items: int = 0
    encode_seconds: float = 0.0
    encode_num_bytes: int = 0
    encode_failures: int = 0
    num_preemptions: int = 0
    computed_tokens: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_embeddings: int = 0
    num_unusable: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_at: list[int] = field(default_factory=list)
    num_steps: int = 0
    iteration_counts: list[int] = field(default_factory=list)
    iteration_tokens: int = 0
    held_features: int = 0
    item_tokens: dict[str, int] = field(default_factory=dict)
    media: dict[str, float] = field(default_factory=dict)
    max_loras: int = 0
    lora_num_bytes: int = 0
    lora_capacity_bytes: int = 0
    running_adapters: list[str] = field(default_factory=list)
    waiting_adapters: list[str] = field(default_factory=list)
    num_engine_restarts: int = 0

    def at_rest(self) -> EngineStats:
        """Return the snapshot after the death of the engine: counters and sizes, nothing in use."""
        return replace(
            self,
            num_ranks=0,
            num_running=0,
            num_waiting=0,
            num_deferred=0,
            waiting_tokens=0,
            kv_blocks_used=0,
            encoder_resident_embeds=0,
            encoder_num_bytes=0,
            held_features=0,
            lora_num_bytes=0,
            running_adapters=[],
            waiting_adapters=[],
        )


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """A LoRA adapter that an engine has loaded.

    Attributes:
        name: The name that requests choose it by.
        path: Folder or Hugging Face id, as it was given.
        digest: Of its content, for caches.
        rank: The largest of its modules.
        in_encoder: It changes towers or projectors, so embeddings of media depend on it.
        folder: Where it was read.
        num_bytes: Memory that it takes, together with others of equal content.
    """

    name: str
    path: str
    digest: bytes
    rank: int
    in_encoder: bool = False
    folder: str = ""
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """Facts that an engine found at its start, and its adapters now.

    ``embed_bytes`` is one item embedding's, ``cache_dtype`` that of keys and values. ``numerics``:
    what decides last bits besides weights, options and inputs (``engine.loading.numerics``).
    ``space``: on Ray, identity of the encoders (``ray.media.space``); empty where it is not known.
    """

    max_model_len: int
    num_kv_blocks: int
    block_size: int
    max_num_batched_tokens: int
    device: str
    dtype: str
    num_threads: int
    load_seconds: float
    embed_bytes: int = 0
    adapters: tuple[AdapterFacts, ...] = ()
    cache_dtype: str = ""
    num_ranks: int = 1
    numerics: str = ""
    space: bytes = b""
