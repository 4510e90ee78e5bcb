"""Train the demo model on pictures that it draws while it trains.

    python -m training.train --out RUN_FOLDER --minutes 120

writes ``RUN_FOLDER/last.pt`` every few minutes (``--resume`` goes on from it) and the checkpoint
in the published layout into ``--export`` each time the held-out accuracy is measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from training.batches import COLOUR_NAMES, GLYPHS, IGNORED, SHAPE_NAMES, Encoder, make_batch
from training.export import MEAN, STD, export, training_weights
from training.model import MERGE, PATCH, DemoModel, Shape, TextLayer, VisionBlock
from training.optimizer import make_optimizers
from training.pictures import SCENES

#: Seeds of held-out batches start here; those of training stay below.
HELD_OUT = 10**12
LABELS = (len(SHAPE_NAMES) + 1, len(COLOUR_NAMES) + 1, len(GLYPHS) + 1)
Batch = dict[str, Any]
#: No picture has more rows or columns of image tokens.
LONGEST_SIDE = 8
POINTER_WIDTH = 64


def as_tensors(batch: Batch) -> Batch:
    """The arrays of a batch as tensors that share their memory."""
    return {k: torch.from_numpy(v) if k != "kinds" else v for k, v in batch.items()}


class Supply:
    """Batches: new ones, and in between those drawn lately once more.

    Drawing costs a few per cent of a step, so it happens in the training process itself.
    """

    def __init__(self, size: int, first: int, uses: int, shares: dict[str, float]) -> None:
        self._encode = Encoder()
        self._size, self._seed, self._uses, self._shares = size, first, uses, shares
        self._kept: list[tuple[int, Batch]] = []
        self._rng = Random(first)

    def next(self) -> Batch:
        """A batch; each is given out ``uses`` times, with others in between."""
        if len(self._kept) > 60 or (self._kept and self._rng.random() > 1 / self._uses):
            place = self._rng.randrange(len(self._kept))
            left, batch = self._kept[place]
            if left > 1:
                self._kept[place] = (left - 1, batch)
            else:
                self._kept[place] = self._kept[-1]
                self._kept.pop()
            return batch
        batch = as_tensors(make_batch(self._encode, self._seed, self._size, self._shares))
        self._seed += 1
        if self._uses > 1:
            self._kept.append((self._uses - 1, batch))
        return batch


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [B, height, width, 3] -> float [B, 3, height, width], as the image processor does."""
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) * 255 for x in (MEAN, STD))
    return (pixels.permute(0, 3, 1, 2).float() - mean) / std


def attention_mask(segments: Tensor) -> Tensor:
    """[B, L] -> [B, 1, L, L]: 0 for earlier tokens of the prefix or of one's own segment."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    key, query = segments[:, None, :], segments[:, :, None]
    allowed = (causal & ((key == 0) | (key == query)))[:, None]
    return torch.zeros(allowed.shape, dtype=torch.bfloat16).masked_fill_(~allowed, -30000.0)


class Learner(nn.Module):
    """The model with heads that are only used while training.

    ``glance`` and ``middle`` foretell from the vision tower what covers each patch and what has
    its middle there; ``place`` foretells from the first text layer row and column of each image
    token, since the architecture gives a picture no absolute positions; ``where`` foretells from
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

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, vocab] at the N labelled places, their labels [N], loss of the heads."""
        tokens, patches = self.demo.visual(normalise(batch["pixels"]))
        hidden, states = self.demo.hidden(
            batch["ids"], batch["positions"], batch["image_index"],
            attention_mask(batch["segments"]), tokens,
        )  # fmt: skip
        where = batch["labels"] >= 0
        logits = self.demo.logits(hidden[where])
        return logits, batch["labels"][where], self._heads_loss(batch, patches, states)

    def _heads_loss(self, batch: Batch, patches: Tensor, states: list[Tensor]) -> Tensor:
        truth = batch["patches"]
        seen = self.glance(patches).float().split(LABELS, dim=-1)
        loss = torch.zeros(())
        for i, weight in enumerate((1.0, 1.0, 2.0)):
            loss = loss + weight * F.cross_entropy(seen[i].flatten(0, 1), truth[:, i].flatten())
        middle = self.middle(patches).float().flatten(0, 1)
        loss = loss + 5.0 * F.cross_entropy(middle, truth[:, 3].flatten())
        image = batch["image_index"] >= 0
        columns = batch["pixels"].shape[2] // (PATCH * MERGE)
        index = batch["image_index"][image]
        row, column = self.place(states[0][image]).float().chunk(2, dim=-1)
        loss = loss + 0.3 * F.cross_entropy(row, index // columns)
        loss = loss + 0.3 * F.cross_entropy(column, index % columns)
        loss = loss + 3.0 * self._pointer_loss(batch, states[-2])
        named = batch["points"][..., 0] >= 0
        if not named.any():
            return loss
        bins = self.where(states[-2][named]).float().view(-1, MERGE * LONGEST_SIDE)
        return loss + 1.5 * F.cross_entropy(bins, batch["points"][named].flatten())

    def _pointer_loss(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Cross entropy of foretelling which image tokens a question is about, from its end."""
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


def measure(learner: Learner, batches: list[Batch]) -> dict[str, float]:
    """Share of questions per kind of which every token of the answer is foretold rightly."""
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


def held_out(count: int, size: int = 32) -> list[Batch]:
    """``count`` batches whose pictures are never trained on."""
    encode = Encoder()
    return [
        as_tensors(make_batch(encode, HELD_OUT + number, size, way="packed"))
        for number in range(count)
    ]


def rate_at(progress: float, step: int) -> float:
    """Share of the full learning rate: a short rise, a long plateau, a straight way down."""
    rise = min(1.0, (step + 1) / 150)
    fall = min(1.0, max(0.0, (1.0 - progress) / 0.4))
    return rise * (0.02 + 0.98 * fall)


class Run:
    """One training run: model, optimizers, average of the weights, clock."""

    def __init__(self, options: argparse.Namespace, rank: int) -> None:
        self.options, self.rank = options, rank
        self.learner = Learner(Shape())
        if options.start_from:
            weights = load_file(Path(options.start_from) / "model.safetensors")
            self.learner.demo.load_state_dict(training_weights(weights))
        self.average = {k: v.clone() for k, v in self.learner.state_dict().items()}
        self.optimizers = make_optimizers(self.learner, options.muon_lr, options.adam_lr)
        self.rates = [group["lr"] for o in self.optimizers for group in o.param_groups]
        self.step = 0
        self.progress = 0.0
        self.started = time.time()
        if options.resume:
            self._load(Path(options.resume))

    def _load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=False)
        self.learner.load_state_dict(saved["learner"], strict=False)
        self.average |= saved["average"]
        self.step, self.started = saved["step"], saved["started"]
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            # Heads that are newer than the saved run start without momentum.
            for group, current in zip(state["param_groups"], optimizer.param_groups, strict=True):
                group["params"] = list(range(len(current["params"])))
            optimizer.load_state_dict(state)
        for group, rate in zip(self._groups(), self.rates, strict=True):
            group["lr"] = rate

    def _groups(self) -> list[dict[str, Any]]:
        return [group for o in self.optimizers for group in o.param_groups]

    def _clock(self) -> float:
        """Share of the time that is gone; by the clock, so that a run always ends in time."""
        deadline = self.options.deadline or self.started + 60 * self.options.minutes
        return min(1.0, (time.time() - self.started) / max(1.0, deadline - self.started))

    def save(self) -> None:
        """Write ``last.pt`` and the published layout."""
        folder = Path(self.options.out)
        torch.save(
            {"learner": self.learner.state_dict(), "average": self.average, "step": self.step,
             "started": self.started, "optimizers": [o.state_dict() for o in self.optimizers]},
            folder / "part.pt",
        )  # fmt: skip
        (folder / "part.pt").replace(folder / "last.pt")
        state = {k.removeprefix("demo."): v for k, v in self.average.items()}
        export(state, Shape(), Path(self.options.export))

    def _share_gradients(self) -> None:
        """Average gradients over the processes; the first one's clock counts for all."""
        gradients = []
        for weight in self.learner.parameters():
            # A batch without named things leaves a head without gradient in one process only.
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            gradients.append(weight.grad)
        clock = torch.tensor([self._clock() * self.options.processes if self.rank == 0 else 0.0])
        flat = torch.cat([g.flatten() for g in gradients] + [clock])
        if self.options.processes > 1:
            dist.all_reduce(flat)
            flat /= self.options.processes
        else:
            flat[-1] = clock[0]
        self.progress = flat[-1].item()
        parts = flat[:-1].split([g.numel() for g in gradients])
        torch._foreach_copy_(
            gradients, [x.view_as(g) for x, g in zip(parts, gradients, strict=True)]
        )

    def train_step(self, batch: Batch) -> tuple[float, float]:
        """One update; returns the two losses."""
        with torch.autocast("cpu", torch.bfloat16):
            logits, labels, glance = self.learner(batch)
        loss = F.cross_entropy(logits.float(), labels)
        (loss + self.options.glance * glance).backward()
        self._share_gradients()
        nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        share = rate_at(self.progress, self.step)
        for group, rate in zip(self._groups(), self.rates, strict=True):
            group["lr"] = rate * share
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(0.998, self.step / (self.step + 20))
        state = self.learner.state_dict()
        torch._foreach_lerp_(list(self.average.values()), list(state.values()), 1 - keep)
        return loss.item(), glance.item()

    def report(self, batches: list[Batch]) -> None:
        """Measure with averaged weights, print, save."""
        current = {k: v.clone() for k, v in self.learner.state_dict().items()}
        self.learner.load_state_dict(self.average)
        found = measure(self.learner, batches)
        self.learner.load_state_dict(current)
        line = {"step": self.step, "progress": round(self.progress, 3)}
        line |= {kind: round(share, 3) for kind, share in found.items()}
        print(json.dumps(line), flush=True)
        self.save()


def work(rank: int, options: argparse.Namespace) -> None:
    """Body of each training process; the first one also measures and saves."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.processes > 1:
        store = dist.FileStore(f"{options.out}/store", options.processes)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=options.processes,
                                timeout=timedelta(hours=3))  # fmt: skip
    if options.compile:
        for block in (VisionBlock, TextLayer):
            block.forward = torch.compile(block.forward, dynamic=True)  # type: ignore[method-assign]
    run = Run(options, rank)
    first = options.first_seed + rank * 10**8 + run.step
    supply = Supply(options.batch, first, options.uses, json.loads(options.shares))
    test = held_out(16) if rank == 0 else []
    losses: list[tuple[float, float]] = []
    told = reported = time.time()
    while run.progress < 1.0:
        losses.append(run.train_step(supply.next()))
        if rank == 0 and len(losses) == 50:
            text, glance = (sum(x) / 50 for x in zip(*losses, strict=True))
            pace = 50 * options.batch * options.processes / (time.time() - told)
            print(f"step {run.step} loss {text:.3f} glance {glance:.3f} {pace:.0f} pictures/s "
                  f"progress {run.progress:.3f}", flush=True)  # fmt: skip
            told, losses = time.time(), []
        if rank == 0 and time.time() - reported > 60 * options.report_minutes:
            run.report(test)
            reported = told = time.time()
    if rank == 0:
        run.report(test)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_argument("--export", help="folder of the checkpoint (default: OUT/export)")
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--deadline", type=float, help="end at this Unix time instead")
    parser.add_argument("--processes", type=int, default=2, help="each takes a batch per step")
    parser.add_argument("--threads", type=int, default=1, help="threads per process")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--batch", type=int, default=16, help="pictures per process and step")
    parser.add_argument("--uses", type=int, default=2, help="how often a batch is used")
    parser.add_argument("--muon-lr", type=float, default=0.012)
    parser.add_argument("--adam-lr", type=float, default=0.002)
    parser.add_argument("--glance", type=float, default=0.3, help="weight of the patch labels")
    parser.add_argument("--report-minutes", type=float, default=6.0)
    parser.add_argument("--shares", default=json.dumps(SCENES), help="kinds of pictures, JSON")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--resume", help="a last.pt")
    parser.add_argument(
        "--start-from", help="an exported checkpoint, whose weights begin a new run"
    )
    options = parser.parse_args()
    options.export = options.export or f"{options.out}/export"
    Path(options.out).mkdir(parents=True, exist_ok=True)
    Path(options.out, "store").unlink(missing_ok=True)
    if options.processes > 1:
        mp.spawn(work, (options,), nprocs=options.processes)
    else:
        work(0, options)


if __name__ == "__main__":
    main()
