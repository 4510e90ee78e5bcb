"""Architectures of GGUF files that run here: names of weights, and what conversions changed.

Source: the conversion scripts of llama.cpp (``convert_hf_to_gguf.py`` and its modules) and the
tables of gguf-py (``constants.py``, ``tensor_mapping.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from sensorium.errors import UnsupportedModelError
from sensorium.models.gguf.reader import GgufFile

_OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_IN_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.(weight|bias)")
_WITHOUT_LAYER = re.compile(r"([a-z_]+)\.(weight|bias)")
_ROTARY = re.compile(
    r"(blk\.[0-9]+\.)?(rope_freqs|rope_factors_(long|short)|attn_rot_embd)\.weight"
)
"""Factors of rotary frequencies, which belong to the configuration."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture: its class in transformers, and names of the weights of a layer.

    ``permuted``: rows of Q and K are stored with the two halves of a head interleaved.
    ``norms_plus_one``: norms are stored with 1 added. ``fused``: QKV and gate-up are one tensor
    each. ``settings``: values of config.json that all its models have.
    """

    kind: str
    model_type: str
    layer: Mapping[str, str] = field(default_factory=lambda: _LAYER)
    permuted: bool = False
    norms_plus_one: bool = False
    fused: bool = False
    settings: Mapping[str, object] = field(default_factory=dict)

    def name(self, stored: str) -> str | None:
        """Return transformers' name of a weight; None for one that is no weight of a layer.

        Unknown names stay as they are, and are found to have no place in the model.
        """
        if _ROTARY.fullmatch(stored):
            return None
        own = _IN_LAYER.fullmatch(stored)
        if own is not None and own[2] in self.layer:
            return f"model.layers.{own[1]}.{self.layer[own[2]]}.{own[3]}"
        outside = _WITHOUT_LAYER.fullmatch(stored)
        if outside is not None and outside[1] in _OUTSIDE:
            return f"{_OUTSIDE[outside[1]]}.{outside[2]}"
        return stored

    def is_permuted(self, stored: str) -> bool:
        """Return whether a tensor's rows are those of Q or K, interleaved."""
        own = _IN_LAYER.fullmatch(stored)
        return self.permuted and own is not None and own[2] in ("attn_q", "attn_k")


_GEMMA = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", "llama", permuted=True),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2"),
    "qwen2vl": Architecture("Qwen2ForCausalLM", "qwen2"),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", _LAYER | _QK_NORMS),
    "phi3": Architecture("Phi3ForCausalLM", "phi3", _LAYER | _FUSED, fused=True),
    "gemma": Architecture("GemmaForCausalLM", "gemma", norms_plus_one=True, settings=_GEMMA),
    "gemma2": Architecture(
        "Gemma2ForCausalLM",
        "gemma2",
        _LAYER | _SANDWICH,
        norms_plus_one=True,
        settings=_GEMMA,
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        "gemma3_text",
        _LAYER | _QK_NORMS | _SANDWICH,
        norms_plus_one=True,
        settings=_GEMMA,
    ),
}
"""Architectures by ``general.architecture``.

Mistral's and SmolLM's files are of ``llama``. The text of Qwen2-VL is that of Qwen2, as its three
axes of positions are one there."""

_PROJECTORS = ("clip", "mmproj")


def architecture_of(file: GgufFile) -> Architecture:
    """Return the architecture of a file. Raises UnsupportedModelError for one that is not run."""
    name = file.architecture
    found = ARCHITECTURES.get(name)
    if name in _PROJECTORS:
        raise UnsupportedModelError(
            f"{file.path.name} is the vision encoder of a model (mmproj), not a model: name the "
            "file of the language model.",
            param="model",
        )
    if found is None:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModelError(
            f"{file.path.name} is of the architecture {name!r:.60}; GGUF files of {known} run. "
            "Other models run from their safetensors checkpoints.",
            param="model",
        )
    experts = file.own("expert_count", 0)
    if type(experts) is not int or experts:
        raise UnsupportedModelError(
            f"{file.path.name} is a mixture of experts, which is not read from GGUF files: take "
            "its safetensors checkpoint.",
            param="model",
        )
    return found
