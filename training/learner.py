"""The demo model for images and videos with the heads that help it to learn, and its accuracy."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.batches import COLOUR_NAMES, GLYPHS, IGNORED, SHAPE_NAMES
from training.export import MEAN, STD
from training.model import FRAMES, MERGE, PATCH, DemoModel, Shape

LABELS = (len(SHAPE_NAMES) + 1, len(COLOUR_NAMES) + 1, len(GLYPHS) + 1)
Batch = dict[str, Any]
#: No image has more rows or columns of image tokens, no video more pairs of frames.
LONGEST_SIDE, MOST_PAIRS = 8, 4
#: Same, came, went, another colour: what can have become of an image token between pairs of frames.
NUM_CHANGES = 4
POINTER_WIDTH = 64


def normalise(pixels: Tensor) -> Tensor:
    """uint8 pixels as normalised floats for the vision tower, as the image processor does.

    [B, height, width, 3] -> [B, 3, height, width];
    [B, 2 T, height, width, 3] -> [B T, 3, 2, height, width].
    """
    mean, std = (torch.tensor(x) * 255 for x in (MEAN, STD))
    x = (pixels.float() - mean) / std
    if pixels.ndim == 4:
        return x.permute(0, 3, 1, 2)
    return x.unflatten(1, (-1, FRAMES)).flatten(0, 1).permute(0, 4, 1, 2, 3)


def attention_mask(segments: Tensor) -> Tensor:
    """[B, L] -> [B, 1, L, L]: 0 for earlier tokens of the prefix or of one's own segment."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    key, query = segments[:, None, :], segments[:, :, None]
    allowed = (causal & ((key == 0) | (key == query)))[:, None]
    return torch.zeros(allowed.shape, dtype=torch.bfloat16).masked_fill_(~allowed, -30000.0)


class Learner(nn.Module):
    """The model with heads that are only used while training.

    ``glance`` and ``middle`` predict from the vision tower what covers each patch and what has
    its middle there; ``place`` predicts from the first text layer row and column of each image
    token, since the architecture gives an image no absolute positions, and ``pair`` the pair of
    frames in a video; ``before`` predicts from the second layer what was at the place of an image
    token in the pair of frames before, and ``change`` what became of it; ``where`` predicts from
    the last layer but one, just before an answer, where the points of the question's turn lie, and
    ``asked`` against ``shown`` which image tokens hold them or the things that it counts.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.demo = DemoModel(shape)
        self.glance = nn.Linear(shape.vision_width, sum(LABELS))
        self.middle = nn.Linear(shape.vision_width, len(SHAPE_NAMES) + len(GLYPHS) + 1)
        self.place = nn.Linear(shape.width, 2 * LONGEST_SIDE)
        self.where = nn.Linear(shape.width, 4 * MERGE * LONGEST_SIDE)
        self.asked = nn.Linear(shape.width, POINTER_WIDTH)
        self.shown = nn.Linear(shape.width, POINTER_WIDTH)
        self.pair = nn.Linear(shape.width, MOST_PAIRS)
        self.before = nn.Linear(shape.width, sum(LABELS[:2]))
        self.change = nn.Linear(shape.width, NUM_CHANGES)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, vocab] at the N labelled places, their labels [N], loss of the heads."""
        tokens, patches = self.demo.visual(normalise(batch["pixels"]))
        tokens = tokens.view(len(batch["ids"]), -1, tokens.shape[-1])
        hidden, states = self.demo.hidden(
            batch["ids"], batch["positions"], batch["image_index"],
            attention_mask(batch["segments"]), tokens,
        )  # fmt: skip
        where = batch["labels"] >= 0
        logits = self.demo.logits(hidden[where])
        return logits, batch["labels"][where], self._heads_loss(batch, patches, states)

    def _heads_loss(self, batch: Batch, patches: Tensor, states: list[Tensor]) -> Tensor:
        loss = torch.zeros(())
        if patches.requires_grad or not self.training:
            loss = self._patch_loss(patches, batch["patches"].flatten(0, -3))
        image = batch["image_index"] >= 0
        rows, columns = (side // (PATCH * MERGE) for side in batch["pixels"].shape[-3:-1])
        pair, index = _divided(batch["image_index"][image], rows * columns)
        row, column = self.place(states[0][image]).float().chunk(2, dim=-1)
        loss = loss + 0.3 * F.cross_entropy(row, index // columns)
        loss = loss + 0.3 * F.cross_entropy(column, index % columns)
        if batch["pixels"].ndim == 5:
            loss = loss + 0.3 * F.cross_entropy(self.pair(states[0][image]).float(), pair)
            loss = loss + 1.0 * self._before_loss(batch, states[1])
        loss = loss + 3.0 * self._pointer_loss(batch, states[-2])
        named = batch["points"][..., 0] >= 0
        if not named.any():
            return loss
        bins = self.where(states[-2][named]).float().view(-1, MERGE * LONGEST_SIDE)
        return loss + 1.5 * F.cross_entropy(bins, batch["points"][named].flatten())

    def _before_loss(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Cross entropy of predicting shape and colour at a place one pair of frames before."""
        size, pairs, _, patches = batch["patches"].shape
        cells = patches // (MERGE * MERGE)
        what = batch["patches"][:, :, :2].view(size, pairs, 2, cells, -1).amax(-1)
        what = what.transpose(2, 3).reshape(size, pairs * cells, 2)
        rows, places = (batch["image_index"] >= cells).nonzero(as_tuple=True)
        truth = what[rows, batch["image_index"][rows, places] - cells]
        seen = self.before(hidden[rows, places]).float().split(LABELS[:2], dim=-1)
        loss = F.cross_entropy(seen[0], truth[:, 0]) + F.cross_entropy(seen[1], truth[:, 1])
        now, then = what[rows, batch["image_index"][rows, places]][:, 1], truth[:, 1]
        # Nothing new, something came, something went, something of another colour.
        change = (then == 0) * 1 + (now == 0) * 2 + (now * then > 0) * 3
        change = torch.where(now == then, 0, change)
        return loss + 2.0 * F.cross_entropy(self.change(hidden[rows, places]).float(), change)

    def _patch_loss(self, patches: Tensor, truth: Tensor) -> Tensor:
        """Cross entropy of predicting which things cover, or centre on, the patches [N, P, D]."""
        seen = self.glance(patches).float().split(LABELS, dim=-1)
        loss = torch.zeros(())
        for i, weight in enumerate((1.0, 1.0, 2.0)):
            loss = loss + weight * F.cross_entropy(seen[i].flatten(0, 1), truth[:, i].flatten())
        middle = self.middle(patches).float().flatten(0, 1)
        return loss + 5.0 * F.cross_entropy(middle, truth[:, 3].flatten())

    def _pointer_loss(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Cross entropy of predicting which image tokens a question is about, from its end."""
        matches, segments = batch["matches"], batch["segments"]
        rows, ends = (matches[..., 0] != IGNORED).nonzero(as_tuple=True)
        if len(rows) == 0:
            return torch.zeros(())
        every = self.shown(hidden) @ self.asked(hidden).mT
        scores = every[rows, :, ends].float()
        of_question = segments[rows, ends][:, None]
        index = batch["image_index"][rows]
        seen = (index >= 0) & ((segments[rows] == 0) | (segments[rows] == of_question))
        truth = (index[:, :, None] == matches[rows, ends][:, None]).any(-1).float()
        scores = scores * POINTER_WIDTH**-0.5 - 2.0
        return F.binary_cross_entropy_with_logits(scores[seen], truth[seen])


def _divided(index: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """Quotient and remainder."""
    return index // by, index % by


def measure(learner: nn.Module, batches: list[Batch]) -> dict[str, float]:
    """Share of questions per kind of which every token of the answer is predicted correctly."""
    right: dict[str, list[bool]] = defaultdict(list)
    learner.eval()
    for batch in batches:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits, labels, _ = learner(batch)
        hits = torch.zeros_like(batch["labels"], dtype=torch.bool)
        where = batch["labels"] >= 0
        hits[where] = logits.argmax(-1) == labels
        for row, kinds in enumerate(batch["kinds"]):
            for number, kind in enumerate(kinds, 1):
                place = (batch["segments"][row] == number) & where[row]
                right[kind].append(bool(hits[row][place].all()))
    learner.train()
    return {kind: sum(found) / len(found) for kind, found in sorted(right.items())}
