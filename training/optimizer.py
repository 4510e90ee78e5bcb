"""Muon for the weight matrices, AdamW for everything else.

Muon: momentum whose matrix is replaced by its nearest orthogonal one, approximated by a
Newton-Schulz iteration with the quintic polynomial of Keller Jordan, "Muon: An optimizer for
hidden layers in neural networks" (2024).
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 4) -> Tensor:
    """Matrices [N, rows, columns] with all singular values moved near 1."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


def parts_of(matrix: Tensor) -> tuple[Tensor, ...]:
    """Views of the matrices that are orthogonalised each for itself.

    A fused qkv weight is three matrices. The merger's large square one is cut into four, one for
    each of the patches that it merges, since the whole would cost as much as all others together.
    """
    rows, columns = matrix.shape
    if rows == 3 * columns:
        return matrix.split(columns)
    if rows == columns and rows >= 512:
        return matrix.split(columns // 4, dim=1)
    return (matrix,)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised matrices; fused weights are taken apart."""

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                buffer = state.setdefault("momentum", torch.zeros_like(weight))
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(buffer, group["momentum"])
                for part, change in zip(parts_of(weight), parts_of(update), strict=True):
                    rows, columns = part.shape
                    by_shape[rows, columns].append((part, change))
            for (rows, columns), pairs in by_shape.items():
                updates = orthogonalize(torch.stack([update for _, update in pairs]))
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                for (weight, _), update in zip(pairs, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["decay"])
                    weight.add_(update.to(weight.dtype), alpha=-scale)


def make_optimizers(
    model: nn.Module, muon_lr: float, adam_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers and before the text model, AdamW for all others."""
    matrices, others = [], []
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        inside = any(part in name for part in ("blocks", "layers", "merger", "projector"))
        inside = inside and weight.ndim == 2
        (matrices if inside else others).append(weight)
    adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [Muon(matrices, lr=muon_lr), adam]
