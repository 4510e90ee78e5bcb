"""Convert a checkpoint of ``checkpoints.py`` with llama.cpp's own script.

    python -m benchmarks.peers.convert_gguf SOURCE FLAGS…

The script knows tokenizers by their hashes, and not the one that is trained here. Its texts are split as Qwen2's are,
so that is what it is taken for. SOURCE is the folder of llama.cpp; the flags go to the script.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """The command line."""
    source = Path(sys.argv[1]).resolve()
    sys.dont_write_bytecode = True
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    from conversion import base  # type: ignore[import-not-found]

    def no_sentencepiece(*_: Any) -> None:
        raise FileNotFoundError("the tokenizer is no SentencePiece model")

    base.TextModel.get_vocab_base_pre = lambda *_: "qwen2"
    base.TextModel._set_vocab_sentencepiece = no_sentencepiece
    script = source / "convert_hf_to_gguf.py"
    sys.argv = [str(script), *sys.argv[2:]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
