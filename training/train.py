"""Train the demo model on images that it draws while it trains.

    python -m training.train --out RUN_FOLDER --minutes 120

writes ``RUN_FOLDER/last.pt`` every few minutes (``--resume`` goes on from it) and the checkpoint
in the published layout into ``--export`` each time the held-out accuracy is measured.
"""

from __future__ import annotations

import argparse
import json
import time
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

from training.batches import Encoder, make_batch
from training.clip_batches import make_clips
from training.export import export, training_weights
from training.learner import Batch, Learner, attention_mask, measure, normalise
from training.model import DemoModel, Shape, TextLayer, VisionBlock
from training.optimizer import make_optimizers
from training.pictures import SCENES
from training.tokenizer import build_tokenizer

#: Seeds of held-out batches start here; those of training stay below.
HELD_OUT = 10**12


def as_tensors(batch: Batch) -> Batch:
    """The arrays of a batch as tensors that share their memory."""
    return {k: torch.from_numpy(v) if k != "kinds" else v for k, v in batch.items()}


class Supply:
    """Batches: new ones, and in between those drawn lately once more.

    Drawing costs a few per cent of a step, so it happens in the training process itself. ``clips``
    is the share of batches of videos, ``noisy`` that of batches with what front ends put around
    questions.
    """

    def __init__(
        self,
        size: int,
        first: int,
        uses: int,
        shares: dict[str, float],
        clips: float,
        noisy: float,
    ) -> None:
        self._encode = Encoder()
        self._size, self._seed, self._uses, self._shares = size, first, uses, shares
        self._clips, self._noisy = clips, noisy
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
        if self._rng.random() < self._clips:
            drawn = make_clips(self._encode, self._seed, self._size, noisy=self._noisy)
        else:
            drawn = make_batch(
                self._encode, self._seed, self._size, self._shares, noisy=self._noisy
            )
        batch = as_tensors(drawn)
        self._seed += 1
        if self._uses > 1:
            self._kept.append((self._uses - 1, batch))
        return batch


def held_out(count: int, size: int = 32, noisy: float = 0.0) -> list[Batch]:
    """``count`` batches of images, and of videos, that are never trained on."""
    encode = Encoder()
    return [
        as_tensors(make(encode, HELD_OUT + number, size, way="packed", noisy=noisy))
        for number in range(count)
        for make in (make_batch, make_clips)
    ]


def rate_at(progress: float, step: int) -> float:
    """Share of the full learning rate: a short rise, a long plateau, a straight way down."""
    rise = min(1.0, (step + 1) / 150)
    fall = min(1.0, max(0.0, (1.0 - progress) / 0.4))
    return rise * (0.02 + 0.98 * fall)


def take_weights(demo: DemoModel, folder: Path) -> None:
    """Take the weights of a checkpoint; tokens that its tokenizer lacks keep their random ones."""
    weights = training_weights(load_file(folder / "model.safetensors"))
    name = "model.embed_tokens.weight"
    rows = demo.state_dict()[name].clone()
    known = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    old = known["model"]["vocab"] | {t["content"]: t["id"] for t in known["added_tokens"]}
    for token, place in build_tokenizer().get_vocab().items():
        if token in old:
            rows[place] = weights[name][old[token]]
    demo.load_state_dict(weights | {name: rows})


class Run:
    """One training run: model, optimizers, average of the weights, clock."""

    def __init__(self, options: argparse.Namespace, rank: int) -> None:
        self.options, self.rank = options, rank
        self.learner = Learner(Shape())
        if options.start_from:
            self._start_from(Path(options.start_from))
        self.teacher = None
        if options.keep:
            self.teacher = DemoModel(Shape())
            take_weights(self.teacher, Path(options.keep))
        if options.freeze_vision:
            for part in (self.learner.demo.visual, self.learner.glance, self.learner.middle):
                part.requires_grad_(False)
        self.trained = [w for w in self.learner.parameters() if w.requires_grad]
        self.average = {k: v.clone() for k, v in self.learner.state_dict().items()}
        self.optimizers = make_optimizers(self.learner, options.muon_lr, options.adam_lr)
        self.rates = [group["lr"] for o in self.optimizers for group in o.param_groups]
        self.step = 0
        self.progress = 0.0
        self.started = time.time()
        if options.resume:
            self._load(Path(options.resume))

    def _start_from(self, folder: Path) -> None:
        take_weights(self.learner.demo, folder)
        if self.options.heads_from:
            saved = torch.load(self.options.heads_from, weights_only=False)["average"]
            heads = {k: v for k, v in saved.items() if not k.startswith("demo.")}
            self.learner.load_state_dict(heads, strict=False)

    def _load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=False)
        self.learner.load_state_dict(saved["learner"], strict=False)
        self.average |= saved["average"]
        self.step, self.started = saved["step"], saved["started"]
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            # Heads that are newer than the saved run stand last, and start without momentum.
            for group, current in zip(state["param_groups"], optimizer.param_groups, strict=True):
                group["params"] = list(range(len(current["params"])))
            optimizer.load_state_dict(state)
        for group, rate in zip(self._groups(), self.rates, strict=True):
            group["lr"] = rate

    def _groups(self) -> list[dict[str, Any]]:
        return [group for o in self.optimizers for group in o.param_groups]

    def _clock(self) -> float:
        """Share of the time that has passed; by the clock, so that a run always ends in time."""
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
        for weight in self.trained:
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

    def _keeping_loss(self, batch: Batch, logits: Tensor) -> Tensor:
        """Divergence from what the model of ``--keep`` predicts about images.

        It is not asked with noise that it may never have seen, nor about videos unless
        ``--keep-clips`` says that it knows them.
        """
        known = batch["pixels"].ndim == 4 or self.options.keep_clips
        if self.teacher is None or not known or batch["noisy"]:
            return torch.zeros(())
        if "taught" not in batch:
            with torch.no_grad():
                tokens, _ = self.teacher.visual(normalise(batch["pixels"]))
                tokens = tokens.view(len(batch["ids"]), -1, tokens.shape[-1])
                hidden, _ = self.teacher.hidden(
                    batch["ids"], batch["positions"], batch["image_index"],
                    attention_mask(batch["segments"]), tokens,
                )  # fmt: skip
                taught = self.teacher.logits(hidden[batch["labels"] >= 0])
            batch["taught"] = taught.float().log_softmax(-1)
        found = logits.float().log_softmax(-1)
        return 2.0 * F.kl_div(found, batch["taught"], log_target=True, reduction="batchmean")

    def train_step(self, batch: Batch) -> tuple[float, float]:
        """One update; returns the two losses."""
        with torch.autocast("cpu", torch.bfloat16):
            logits, labels, glance = self.learner(batch)
            kept = self._keeping_loss(batch, logits)
        loss = F.cross_entropy(logits.float(), labels)
        (loss + self.options.glance * glance + kept).backward()
        self._share_gradients()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
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
    shares = json.loads(options.shares)
    supply = Supply(options.batch, first, options.uses, shares, options.clips, options.noisy)
    test = held_out(10) if rank == 0 else []
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
    parser.add_argument("--clips", type=float, default=0.35, help="share of batches of clips")
    parser.add_argument(
        "--noisy", type=float, default=0.25, help="share of batches with front ends' additions"
    )
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--resume", help="a last.pt")
    parser.add_argument(
        "--start-from", help="an exported checkpoint, whose weights begin a new run"
    )
    parser.add_argument(
        "--freeze-vision", action="store_true", help="leave the vision tower as --start-from has it"
    )
    parser.add_argument("--keep", help="a checkpoint whose answers about pictures are to be kept")
    parser.add_argument(
        "--keep-clips", action="store_true", help="the model of --keep knows clips, too"
    )
    parser.add_argument("--heads-from", help="a last.pt whose helping heads --start-from takes too")
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
