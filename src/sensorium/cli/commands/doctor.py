"""``sensorium doctor``: what keeps models on this machine from running, or from running fast."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterable, Iterator
from typing import Any

from sensorium.cli.doctor import machine, running, software, storage
from sensorium.cli.doctor.finding import LEVELS, Finding
from sensorium.config import ServerConfig

DESCRIPTION = (
    "Look for what is wrong with this machine: cores, huge pages, threads, memory and limits, "
    "/dev/shm, cache folders, GPU and driver, ports, versions of packages, the first kernel. Each "
    "finding says what to do. Exit status: 0, or 1 when there is a problem (with --strict also for "
    "a warning)."
)
COMMON = {
    "--json": "--json",
    "--quick": "--quick",
    "--strict": "--strict",
    "--host": "--host 0.0.0.0",
    "--port": "--port 9000",
}
_MARKS = {"ok": "ok", "note": "note", "warning": "WARNING", "problem": "PROBLEM"}


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "doctor",
        help="find what is wrong with this machine",
        usage="%(prog)s [options]",
        description=DESCRIPTION,
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.add_argument(
        "--quick", action="store_true", help="import no libraries, run no kernel, look for no GPU"
    )
    parser.add_argument("--strict", action="store_true", help="exit with status 1 for a warning")
    parser.add_argument(
        "--host", metavar="TEXT", default="127.0.0.1", help="address of a server to be"
    )
    parser.add_argument(
        "--port", metavar="N", type=int, default=8000, help="its port (default: 8000)"
    )
    parser.common = COMMON
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; return 1 when there is a problem."""
    ServerConfig(host=arguments.host, port=arguments.port)  # checks them
    found = _findings(arguments)
    if arguments.json:
        findings = list(found)
        print(json.dumps({"findings": [finding.as_dict() for finding in findings]}, indent=2))
    else:
        findings = list(_printed(found))
        counts = [f"{_count(findings, level)} {level}" for level in LEVELS]
        print(f"\n{', '.join(counts)}")
    bad = {"problem", "warning"} if arguments.strict else {"problem"}
    return int(any(finding.level in bad for finding in findings))


def _findings(arguments: argparse.Namespace) -> Iterator[Finding]:
    yield from software.environment()
    yield from software.packages()
    yield from machine.processors()
    yield from machine.architecture(platform.machine(), machine.cpu_flags())
    yield from machine.load()
    yield from machine.threads()
    yield from machine.huge_pages()
    yield from machine.memory()
    yield from machine.limits()
    yield from storage.shared_memory()
    yield from storage.temporary()
    yield from storage.kernel_cache()
    yield from storage.downloads()
    yield from running.port(arguments.host, arguments.port)
    if not arguments.quick:
        broken = list(software.libraries())
        yield from broken
        if not broken:
            # Before anything else imports torch, whose time counts.
            yield from running.first_kernel()
            yield from software.gpus()


def _printed(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Print each finding as it comes."""
    for finding in findings:
        print(f"{_MARKS[finding.level]:<8} {finding.check}: {finding.facts}", flush=True)
        if finding.advice:
            print(f"{'':<8} -> {finding.advice}")
        yield finding


def _count(findings: Iterable[Finding], level: str) -> int:
    return sum(finding.level == level for finding in findings)
