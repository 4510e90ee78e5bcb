"""The decoder of Llama, Qwen2, Qwen3, Mistral and Phi-3: pre-norm blocks of attention and MLP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from sensorium.errors import ConfigError
from sensorium.kernels import ops
from sensorium.kernels.batch import AttentionBatch
from sensorium.layers.attention import Attention
from sensorium.layers.embedding import Embedding, LMHead
from sensorium.layers.mlp import GatedMLP
from sensorium.layers.norm import RMSNorm
from sensorium.layers.rotary import Rotary
from sensorium.models.configs import TextConfig
from sensorium.models.interface import BuildOptions, Decoded, Packed, Part, Tied, WeightSlot
from sensorium.models.loading.memory import owned
from sensorium.models.loading.weights import linear_slot, norm_slot
from sensorium.models.parts.division import Division
from sensorium.multimodal.items import Features


class DecoderLayer:
    """Norm, attention, norm, MLP; the norms also add to the residual stream."""

    __slots__ = ("attention", "attention_norm", "mlp", "mlp_norm")

    def __init__(self, config: TextConfig, window: int | None) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            qkv_bias=config.qkv_bias,
            o_bias=config.o_bias,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            window=window,
        )
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(
            config.hidden_size, config.inner_size, config.mlp_bias, config.activation
        )

    def divide(self, division: Division) -> None:
        """Let the results of this rank's part of the layer be summed with the others'."""
        reduce = ops.between_launches(division.collectives.all_reduce)
        self.attention.o.reduce = self.mlp.down.reduce = reduce

    def slots(
        self, config: TextConfig, name: str, division: Division | None
    ) -> Iterator[WeightSlot]:
        """Slots of the weights under ``name``, such as ``layers.0``.

        Phi-3's files are fused already. division: what this rank takes of them, where there are
        several; ``config`` is the whole decoder's.
        """
        attention, mlp = self.attention, self.mlp
        cuts = [] if division is None else division.qkv()
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        own = f"{name}.self_attn"
        yield norm_slot(self.attention_norm, f"{name}.input_layernorm")
        if config.fused:
            yield linear_slot(attention.qkv, [(f"{own}.qkv_proj", q + 2 * kv)], cuts)
        else:
            parts = [(f"{own}.q_proj", q), (f"{own}.k_proj", kv), (f"{own}.v_proj", kv)]
            yield linear_slot(attention.qkv, parts, cuts)
        if attention.q_norm is not None and attention.k_norm is not None:
            yield norm_slot(attention.q_norm, f"{own}.q_norm")
            yield norm_slot(attention.k_norm, f"{own}.k_norm")
        cuts = [] if division is None else division.o()
        yield linear_slot(attention.o, [(f"{own}.o_proj", config.hidden_size)], cuts, q)
        yield norm_slot(self.mlp_norm, f"{name}.post_attention_layernorm")
        inner = config.inner_size
        cuts = [] if division is None else division.gate_up()
        if config.fused:
            yield linear_slot(mlp.gate_up, [(f"{name}.mlp.gate_up_proj", 2 * inner)], cuts)
        else:
            halves = [(f"{name}.mlp.gate_proj", inner), (f"{name}.mlp.up_proj", inner)]
            yield linear_slot(mlp.gate_up, halves, cuts)
        cuts = [] if division is None else division.down()
        down = [(f"{name}.mlp.down_proj", config.hidden_size)]
        yield linear_slot(mlp.down, down, cuts, inner)


class Decoder:
    """Embedding, layers, final norm and head, with rotary factors.

    With ``options.collectives`` it is one rank's part. Raises ConfigError for an unknown activation
    or rotary scaling, or where it cannot be divided.
    """

    def __init__(self, config: TextConfig, options: BuildOptions) -> None:
        self.config = config
        ranks = options.collectives
        self._division = None if ranks is None else Division(config, ranks)
        own = config if self._division is None else self._division.own
        try:
            self.layers = [DecoderLayer(own, window) for window in config.windows]
            self.rotary = Rotary(
                config.rotary_dim,
                config.rope_theta,
                config.rope,
                config.max_position,
                device=options.device,
            )
        except KeyError as error:
            raise ConfigError(f"config.json: the rotary scaling lacks {error}.") from error
        except ValueError as error:
            raise ConfigError(f"config.json: {error}.", param="model") from error
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.has_head = options.head
        first, end = (0, config.vocab_size) if self._division is None else self._division.vocabulary
        self.embedding = Embedding(end - first, config.hidden_size)
        self.head = LMHead(end - first, config.hidden_size)
        if self._division is not None:
            self._divide(self._division)
        replays = options.replay
        self._steps = ops.step_runner(self._run, options.device) if replays else self._run
        self.whole_steps: ops.WholeSteps[Decoded] | None = None
        """Replays steps of generated tokens, from ids to the next tokens; None where that is not
        done."""
        if replays and self.has_head and self._division is None:
            self.whole_steps = ops.whole_steps(self._run_whole, options.device, options.dtype)

    def _divide(self, division: Division) -> None:
        """Let all layers work together with those of the other ranks."""
        first, num_ids = division.vocabulary[0], self.config.vocab_size
        self.embedding.divide(first, num_ids, division.collectives.all_reduce)
        self.head.join = division.join_logits
        for layer in self.layers:
            layer.divide(division)

    def slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Slots of the weights under ``prefix``.

        The head, where it is wanted, is ``lm_head`` without prefix. It is the embedding where the
        configuration ties them and the checkpoint holds no other.
        """
        shape = (self.config.vocab_size, self.config.hidden_size)
        cut = None if self._division is None else self._division.vocabulary_cut
        table = Part(f"{prefix}embed_tokens.weight", shape, cut)
        yield WeightSlot(
            (table,),
            self._load_embedding,
            layers=(self.embedding,),
            role="head",
            packed=Packed(table.name, (), self.embedding.load_packed),
        )
        for index, layer in enumerate(self.layers):
            for slot in layer.slots(self.config, f"{prefix}layers.{index}", self._division):
                yield replace(slot, role="decoder")
        yield replace(norm_slot(self.norm, f"{prefix}norm"), role="decoder")
        if self.has_head:
            tied = Tied(table, lambda: self.head.tie(self.embedding))
            cuts = [] if cut is None else [cut]
            head = linear_slot(self.head.linear, [("lm_head", self.config.vocab_size)], cuts)
            yield replace(head, tied=tied if self.config.tied else None, role="head")

    def _load_embedding(self, weight: torch.Tensor) -> None:
        # A quantized table has memory of its own.
        self.embedding.load(owned(weight) if self.embedding.quantize is None else weight)

    def forward(
        self, embeds: torch.Tensor, batch: AttentionBatch, added: Sequence[torch.Tensor] = ()
    ) -> torch.Tensor:
        """Run all layers and the final norm: (T, H) -> (T, H).

        Overwrites ``embeds``, which becomes the residual stream. ``added``: tensors (T, H) that the
        first layers add to the stream, one per layer. The result is valid until the next step.
        """
        if not added:
            return self._steps(embeds, batch)
        return self._run(embeds, batch, added)

    def _run(
        self, embeds: torch.Tensor, batch: AttentionBatch, added: Sequence[torch.Tensor] = ()
    ) -> torch.Tensor:
        residual = embeds
        layers = self.layers
        x = layers[0].attention_norm(residual)
        last = len(layers) - 1
        for index, layer in enumerate(layers):
            x = layer.mlp_norm.forward_add(residual, layer.attention(x, batch, index))
            norm = self.norm if index == last else layers[index + 1].attention_norm
            x = layer.mlp(x)
            if index < len(added):
                residual.add_(added[index])
            x = norm.forward_add(residual, x)
        return x

    def decode(self, ids: torch.Tensor, batch: AttentionBatch) -> Decoded | None:
        """See ``Model``: embedding, layers, head and the choice of the tokens in one launch."""
        if self.whole_steps is None or not self.whole_steps.takes(ids.shape[0]):
            return None
        first = ids if self.embedding.is_replayable else self.embedding(ids)
        return self.whole_steps(first, batch)

    def _run_whole(self, first: torch.Tensor, batch: AttentionBatch) -> Decoded:
        """Run a step from its ids (T,), or from their embeddings (T, H)."""
        embeds = first if first.dim() == 2 else self.embedding(first)
        hidden = self._run(embeds, batch)
        logits = self.head(hidden)
        return Decoded(hidden, logits, ops.choose_tokens(logits, hidden))


class DecoderModel:
    """The ``Model`` protocol over a ``Decoder``, the base of all native models.

    Text models use it as it is, others add an encoder.
    """

    prefix = ""
    """Prefix of the decoder's weight names."""

    def __init__(self, config: TextConfig, options: BuildOptions) -> None:
        self.shape = config.shape
        self.dtype = options.dtype
        self.device = options.device
        self.decoder = Decoder(config, options)
        headless = config.tied or not options.head
        self.ignored_weights: tuple[str, ...] = (r"lm_head\..*",) if headless else ()

    @property
    def has_encoder(self) -> bool:
        """Return false: a decoder alone has no encoder."""
        return False

    def slots(self) -> Iterator[WeightSlot]:
        """See ``LoadableModel``."""
        yield from self.decoder.slots(self.prefix)

    def encode(self, items: Sequence[Features]) -> list[torch.Tensor]:
        """Raise ValueError for any item: a decoder alone takes no media."""
        if items:
            raise ValueError(f"this model has no encoder for {items[0].modality}")
        return []

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return token embeddings (T, H) of ids (T,)."""
        return self.decoder.embedding(ids)

    def rotary(
        self, positions: torch.Tensor, lengths: Sequence[tuple[int, int]] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos, sin (T, rotary_dim / 2) of positions (T,) or (3, T); see ``Model``."""
        return self.decoder.rotary.cos_sin(positions, lengths)

    def forward(self, embeds: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """Return hidden states (T, H) after the final norm; overwrites ``embeds``."""
        return self.decoder.forward(embeds, batch)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits (N, V) of hidden states (N, H)."""
        return self.decoder.head(hidden)

    def decode(self, ids: torch.Tensor, batch: AttentionBatch) -> Decoded | None:
        """See ``Model``."""
        return self.decoder.decode(ids, batch)


def clone_parts(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copy the parts of a batch, so that keeping one does not keep the memory of the others."""
    return [part.clone() for part in parts] if len(parts) > 1 else list(parts)
