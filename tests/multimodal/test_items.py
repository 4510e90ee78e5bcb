import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from sensorium.multimodal.cache.digest import canonical
from sensorium.multimodal.items import is_tensor


def test_what_is_a_tensor() -> None:
    assert is_tensor(torch.zeros(1))
    assert is_tensor(torch.nn.Parameter(torch.zeros(1)))
    for other in (np.zeros(1), [1.0], None, torch, torch.Tensor):
        assert not is_tensor(other)


def test_while_another_thread_imports_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server imports torch with the first embeddings that it gets; other requests come meanwhile."""
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    assert not is_tensor(1)
    assert canonical({"num_frames": 4}) == "{'num_frames':4}"


def test_torch_is_not_imported_for_it() -> None:
    script = (
        "import sys; from sensorium.multimodal.items import is_tensor; "
        "assert not is_tensor(1) and 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
