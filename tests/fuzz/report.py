"""What a run found: counts, offending requests kept as files, a table at the end."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.requests import Sent
from tests.fuzz.verdict import Answer

_INTERVAL_SECONDS = 10.0


@dataclass
class Report:
    """Filled while a run goes on. ``folder``: where offending requests are kept."""

    title: str
    num_requests: int
    folder: Path
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    started_at: float = field(default_factory=time.monotonic)
    told_at: float = 0.0

    def count(self, answer: Answer, seconds: float) -> None:
        """Take note of an answer."""
        self.seconds.append(seconds)
        self.counts[f"{answer.status} {answer.code}".strip() if answer.status else "lost"] += 1
        now = time.monotonic()
        if now - self.told_at > _INTERVAL_SECONDS:
            self.told_at = now
            rate = len(self.seconds) / (now - self.started_at)
            done = f"{len(self.seconds)} of {self.num_requests}"
            print(f"{self.title}: {done}, {rate:.1f}/s, {len(self.violations)} wrong", flush=True)

    def violation(self, what: str, sent: Sent | None = None, answer: Answer | None = None) -> None:
        """Something that must not be. The request is kept in a file, to be sent again."""
        if sent is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{self.title}-{len(self.violations):04}.json"
            stored = sent.to_json() | {"wrong": what}
            if answer is not None:
                stored["answer"] = [answer.status, answer.body[:2000].decode("utf-8", "replace")]
            path.write_text(json.dumps(stored, indent=1))
            what = f"{what} ({sent.what}; kept as {path.name})"
        self.violations.append(what)
        print(f"{self.title}: WRONG: {what[:500]}", flush=True)

    def table(self) -> str:
        """Everything, for a reader."""
        took = time.monotonic() - self.started_at
        rows = [f"{self.title}: {len(self.seconds)} requests in {took:.0f} s"]
        rows += [f"  {num:7}  {name}" for name, num in self.counts.most_common()]
        if self.seconds:
            ranked = sorted(self.seconds)
            p50, p99 = (ranked[int(len(ranked) * part)] for part in (0.5, 0.99))
            rows.append(f"  seconds: p50 {p50:.3f}, p99 {p99:.3f}, most {ranked[-1]:.3f}")
        rows += [f"  {note}" for note in self.notes]
        rows.append(f"  {len(self.violations)} violations")
        rows += [f"    {what[:300]}" for what in self.violations[:50]]
        return "\n".join(rows)

    def to_json(self) -> dict[str, Any]:
        """Everything, for a program."""
        ranked = sorted(self.seconds) or [0.0]
        return {
            "title": self.title,
            "requests": len(self.seconds),
            "counts": dict(self.counts),
            "seconds": {
                "p50": ranked[len(ranked) // 2],
                "p99": ranked[int(len(ranked) * 0.99)],
                "most": ranked[-1],
            },
            "notes": self.notes,
            "memory": self.memory,
            "violations": self.violations,
        }
