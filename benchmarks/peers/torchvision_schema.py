"""Let a torchvision that was built for CUDA be imported beside a CPU torch.

PyPI has no CPU build of torchvision. Beside a CPU torch its compiled operators do not load, and the
import fails because the schema of ``nms`` is not known. Nothing measured here calls ``nms``: this
declares the schema, so that the import succeeds. Run it once, with the path of the environment:

    python -m benchmarks.peers.torchvision_schema VENV
"""

from __future__ import annotations

import sys
from pathlib import Path

MARK = "# declared by torchvision_schema.py: the compiled operators did not load"
DECLARATION = f"""{MARK}
if not torchvision.extension._has_ops():
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _declared.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
ANCHOR = "import torchvision.extension"


def prepare(environment: Path) -> Path:
    """Insert the declaration once; the changed file.

    Raises FileNotFoundError or ValueError when it is not so.
    """
    pattern = "lib/python3*/site-packages/torchvision/_meta_registrations.py"
    file = next(environment.glob(pattern), None)
    if file is None:
        raise FileNotFoundError(f"no torchvision in {environment}")
    text = file.read_text()
    if MARK in text:
        return file
    head, anchor, tail = text.partition(ANCHOR)
    if not anchor:
        raise ValueError(f"{file} has no line {ANCHOR!r}: this torchvision is of another version")
    rest_of_line, newline, tail = tail.partition("\n")
    file.write_text(f"{head}{anchor}{rest_of_line}{newline}{DECLARATION}{tail}")
    return file


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print("prepared", prepare(Path(sys.argv[1])))
