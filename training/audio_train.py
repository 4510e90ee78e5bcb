"""Train the demo model for sounds on sounds that it draws while it trains.

    python -m training.speech --out runs/speech.npz
    python -m training.audio_train --speech runs/speech.npz --out runs/audio --minutes 60

writes ``last.pt`` into the run's folder every few minutes (``--resume`` goes on from it) and the
checkpoint in the published layout into ``--export``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.audio_batches import AudioEncoder, make_sounds
from training.audio_export import export
from training.audio_model import AudioDemoModel, AudioLayer, AudioShape
from training.batches import IGNORED
from training.learner import attention_mask, measure
from training.model import TextLayer
from training.optimizer import make_optimizers
from training.sounds import EVENTS, MOST_BEEPS
from training.speech import Speech
from training.train import HELD_OUT, rate_at

Batch = dict[str, Any]


class AudioSupply:
    """Batches: new ones, and in between those drawn lately once more."""

    def __init__(self, speech: Speech, size: int, first: int, uses: int) -> None:
        self._encode, self._speech = AudioEncoder(), speech
        self._size, self._seed, self._uses = size, first, uses
        self._fresh: list[Batch] = []
        self._kept: list[tuple[int, Batch]] = []
        self._rng = Random(first)

    def next(self) -> Batch:
        """A batch; each is given out ``uses`` times, with others in between."""
        if len(self._kept) > 120 or (self._kept and self._rng.random() > 1 / self._uses):
            place = self._rng.randrange(len(self._kept))
            left, batch = self._kept[place]
            if left > 1:
                self._kept[place] = (left - 1, batch)
            else:
                self._kept[place] = self._kept[-1]
                self._kept.pop()
            return batch
        if not self._fresh:
            self._fresh = make_sounds(self._encode, self._speech, self._seed, self._size, 6)
            self._seed += 1
        batch = self._fresh.pop()
        if self._uses > 1:
            self._kept.append((self._uses - 1, batch))
        return batch


class AudioLearner(nn.Module):
    """The model with heads that are only used while training.

    ``events`` and ``begun`` predict at each position of the encoder what sounds there and how many
    events have begun so far; ``counted`` the latter from the last text layer but one, at each audio
    token.
    """

    def __init__(self, shape: AudioShape) -> None:
        super().__init__()
        self.demo = AudioDemoModel(shape)
        self.events = nn.Linear(shape.audio_width, len(EVENTS))
        self.begun = nn.Linear(shape.audio_width, MOST_BEEPS + 1)
        self.counted = nn.Linear(shape.width, MOST_BEEPS + 1)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, vocab] at the N labelled places, their labels [N], loss of the heads."""
        tokens, heard = self.demo.listen(batch["features"], batch["lengths"])
        hidden, states = self.demo.hidden(
            batch["ids"], batch["positions"], batch["audio_index"],
            attention_mask(batch["segments"]), tokens,
        )  # fmt: skip
        where = batch["labels"] >= 0
        loss = _cross_entropy(self.events(heard), batch["events"])
        loss = loss + 0.5 * _cross_entropy(self.begun(heard), batch["begun"])
        begun = batch["begun"]
        last = begun.shape[1] // 8
        by_token = begun.view(len(begun), last, 8).amax(-1)
        audio = batch["audio_index"] >= 0
        rows = audio.nonzero(as_tuple=True)[0]
        truth = by_token[rows, batch["audio_index"][audio]]
        loss = loss + 0.5 * _cross_entropy(self.counted(states[-2][audio]), truth)
        return self.demo.logits(hidden[where]), batch["labels"][where], loss


def _cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    flat = logits.float().flatten(0, -2)
    return F.cross_entropy(flat, truth.flatten(), ignore_index=IGNORED)


class AudioRun:
    """One training run: model, optimizers, average of the weights, clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.learner = AudioLearner(AudioShape())
        self.average = {k: v.clone() for k, v in self.learner.state_dict().items()}
        self.optimizers = make_optimizers(self.learner, options.muon_lr, options.adam_lr)
        self.rates = [group["lr"] for group in self._groups()]
        self.step, self.started = 0, time.time()
        if options.resume:
            saved = torch.load(options.resume, weights_only=False)
            self.learner.load_state_dict(saved["learner"])
            self.average, self.step = saved["average"], saved["step"]
            self.started = saved["started"]
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)

    def _groups(self) -> list[dict[str, Any]]:
        return [group for o in self.optimizers for group in o.param_groups]

    def progress(self) -> float:
        """Share of the time that is gone; by the clock, so that a run always ends in time."""
        deadline = self.options.deadline or self.started + 60 * self.options.minutes
        return min(1.0, (time.time() - self.started) / max(1.0, deadline - self.started))

    def train_step(self, batch: Batch) -> tuple[float, float]:
        """One update; returns the two losses."""
        with torch.autocast("cpu", torch.bfloat16):
            logits, labels, heads = self.learner(batch)
        loss = F.cross_entropy(logits.float(), labels)
        (loss + self.options.heads * heads).backward()
        nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        share = rate_at(self.progress(), self.step)
        for group, rate in zip(self._groups(), self.rates, strict=True):
            group["lr"] = rate * share
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(0.998, self.step / (self.step + 20))
        state = self.learner.state_dict()
        torch._foreach_lerp_(list(self.average.values()), list(state.values()), 1 - keep)
        return loss.item(), heads.item()

    def report(self, batches: list[Batch]) -> None:
        """Measure with averaged weights, print, save."""
        current = {k: v.clone() for k, v in self.learner.state_dict().items()}
        self.learner.load_state_dict(self.average)
        found = measure(self.learner, batches)
        self.learner.load_state_dict(current)
        line = {"step": self.step, "progress": round(self.progress(), 3)}
        print(json.dumps(line | {k: round(v, 3) for k, v in found.items()}), flush=True)
        self.save()

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
        export(state, AudioShape(), Path(self.options.export))


def train(options: argparse.Namespace) -> None:
    """Train until the clock says that it is enough."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.compile:
        for layer in (AudioLayer, TextLayer):
            layer.forward = torch.compile(layer.forward, dynamic=True)  # type: ignore[method-assign]
    speech = Speech.load(Path(options.speech))
    run = AudioRun(options)
    supply = AudioSupply(speech, options.batch, options.first_seed + run.step, options.uses)
    encode = AudioEncoder()
    test = make_sounds(encode, speech, HELD_OUT, 32, 8, "packed", "espeak")
    losses: list[tuple[float, float]] = []
    told = reported = time.time()
    while run.progress() < 1.0:
        losses.append(run.train_step(supply.next()))
        if len(losses) == 100:
            text, heads = (sum(x) / 100 for x in zip(*losses, strict=True))
            pace = 100 * options.batch / (time.time() - told)
            print(f"step {run.step} loss {text:.3f} heads {heads:.3f} {pace:.0f} sounds/s "
                  f"progress {run.progress():.3f}", flush=True)  # fmt: skip
            told, losses = time.time(), []
        if time.time() - reported > 60 * options.report_minutes:
            run.report(test)
            reported = told = time.time()
            losses = []
    run.report(test)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--speech", required=True, help="what training.speech wrote")
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_argument("--export", help="folder of the checkpoint (default: OUT/export)")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--deadline", type=float, help="end at this Unix time instead")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--batch", type=int, default=32, help="sounds per step")
    parser.add_argument("--uses", type=int, default=2, help="how often a batch is used")
    parser.add_argument("--muon-lr", type=float, default=0.012)
    parser.add_argument("--adam-lr", type=float, default=0.002)
    parser.add_argument("--heads", type=float, default=0.5, help="weight of the auxiliary heads")
    parser.add_argument("--report-minutes", type=float, default=6.0)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--resume", help="a last.pt")
    options = parser.parse_args()
    options.export = options.export or f"{options.out}/export"
    Path(options.out).mkdir(parents=True, exist_ok=True)
    train(options)


if __name__ == "__main__":
    main()
