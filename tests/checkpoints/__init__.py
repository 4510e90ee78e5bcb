"""Tiny random checkpoints of the native families, written to a folder as their publishers write
them.

Each builder makes a ``transformers`` model with lively random weights (so that greedy answers vary
and depend on the picture), and writes its weights under the names of one of three layouts:

- ``hub``: as first published, with the constants that older files store, and an older config.json
- ``resaved``: as transformers 4.52 and later wrote them
- ``t5``: as ``save_pretrained`` of transformers 5 writes them, with a newer config.json

Each folder has a working byte-level tokenizer with the family's special tokens, a chat template,
and the processor and generation files. The builders return the folder.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.checkpoints.common import SENTENCES, VOCAB_SIZE, enliven
from tests.checkpoints.embedder import make_embedder
from tests.checkpoints.llava import make_llava
from tests.checkpoints.llava_onevision import make_llava_onevision
from tests.checkpoints.minicpmv import make_minicpmv
from tests.checkpoints.phi3_v import make_phi3_v
from tests.checkpoints.qwen import make_qwen2_5_vl, make_qwen2_vl
from tests.checkpoints.qwen3 import make_qwen3_vl
from tests.checkpoints.text import make_text
from tests.checkpoints.ultravox import make_ultravox

__all__ = [
    "NATIVE",
    "SENTENCES",
    "VOCAB_SIZE",
    "enliven",
    "make_embedder",
    "make_llava",
    "make_llava_onevision",
    "make_minicpmv",
    "make_phi3_v",
    "make_qwen2_5_vl",
    "make_qwen2_vl",
    "make_qwen3_vl",
    "make_text",
    "make_ultravox",
]

NATIVE: dict[str, Callable[..., Path]] = {
    **{f: partial(make_text, f) for f in ("llama", "qwen2", "qwen3", "mistral", "phi3")},
    "qwen2_vl": make_qwen2_vl,
    "qwen2_5_vl": make_qwen2_5_vl,
    "qwen3_vl": make_qwen3_vl,
    "llava": make_llava,
    "llava_onevision": make_llava_onevision,
    "phi3_v": make_phi3_v,
    "minicpmv": make_minicpmv,
    "ultravox": make_ultravox,
}
"""The builder of each native family."""
