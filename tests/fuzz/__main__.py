"""The long run by hand: ``python -m tests.fuzz --help``."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

from tests.fuzz.campaign import Plan, fuzz
from tests.fuzz.crowd import mixed
from tests.fuzz.report import Report
from tests.fuzz.requests import Sent
from tests.fuzz.served import UNCACHED, Served


def main() -> int:
    """Run, print a table; 1 when anything was wrong."""
    arguments = _parser().parse_args()
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="sensorium-fuzz-"))
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.replay:
        asyncio.run(_replay(arguments.model[0], arguments.replay, folder))
        return 0
    plan = Plan(arguments.requests, arguments.clients, arguments.seed, folder)
    reports = [asyncio.run(_run(model, plan, arguments.corrupt)) for model in arguments.model]
    print(f"\noffending requests and logs of the servers: {folder}")
    for report in reports:
        print(report.table())
    if arguments.out:
        results = [report.to_json() for report in reports]
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    return int(any(report.violations for report in reports))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description="Send damaged and absurd requests to served models; exit 1 when one does what "
        "it must not.",
    )
    parser.add_argument("--requests", type=int, default=1000, help="requests to each model")
    parser.add_argument(
        "--model",
        nargs="+",
        default=["demo", "demo-audio"],
        help="models to serve, one after the other",
    )
    parser.add_argument("--clients", type=int, default=8, help="requests under way at a time")
    parser.add_argument("--seed", type=int, default=0, help="decides all requests")
    parser.add_argument(
        "--corrupt",
        type=_percent,
        metavar="PERCENT",
        help="send good requests with this part of damaged media among them (such as 10%%) in "
        "place of fuzz, and "
        "compare each answer with the one given alone",
    )
    parser.add_argument("--keep", type=Path, help="folder for offending requests and logs")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument(
        "--replay", type=Path, nargs="+", help="send kept requests again and print the answers"
    )
    return parser


def _percent(text: str) -> float:
    value = float(text.removesuffix("%")) / 100
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0% and 100%")
    return value


async def _run(model: str, plan: Plan, corrupt: float | None) -> Report:
    served = Served(model, plan.folder, UNCACHED if corrupt is not None else ())
    async with served:
        if corrupt is None:
            report = await fuzz(served, plan)
        else:
            report = await mixed(served, plan, corrupt)
    if served.status != 0:
        report.violation(f"the server ended with status {served.status}")
    return report


async def _replay(model: str, paths: list[Path], folder: Path) -> None:
    async with Served(model, folder) as served:
        for path in paths:
            sent = Sent.from_json(json.loads(path.read_text()))
            answer = await served.send(sent)
            print(f"{path.name}: {answer.status} {answer.body[:2000]!r} {answer.lost}")


if __name__ == "__main__":
    sys.exit(main())
