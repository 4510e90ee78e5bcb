"""Media handling of a server, measured in sections. Run from the root of the repository.

    python -m benchmarks.media python -m benchmarks.media known once --quick python -m
    benchmarks.media load --clients 8 --image-size 1024x1024 --server-flags "--num-media-workers 2"
    python -m benchmarks.media peers --vllm-python ENVIRONMENT/bin/python --checkpoint FOLDER

Each section starts servers of its own and ends them. The results are written as JSON after each
section, all values beside the medians. The exit status is 1 when a target is missed or a section
failed; the last lines say which. With ``--quick`` everything is small and few: it shows that all
works, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, Row, add_flags, settings_of
from benchmarks.media import cache, known, load, once, peers, preprocess, recovery, video
from sensorium.bench.report import plain

SECTIONS: dict[str, Any] = {
    module.__name__.rpartition(".")[2]: module
    for module in (preprocess, load, known, once, cache, recovery, video, peers)
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    about = [f"{name}: {module.__doc__.splitlines()[0]}" for name, module in SECTIONS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.media",
        description=f"{__doc__}\n" + "\n".join(about),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="default: all")
    parser.add_argument("--quick", action="store_true", help="small and few, as a trial")
    parser.add_argument("--folder", type=Path, help="for logs and caches (default: temporary)")
    parser.add_argument("--output", type=Path)
    add_flags(parser, [module.Settings for module in SECTIONS.values()])
    options = parser.parse_args(arguments)
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    options.sections = options.sections or list(SECTIONS)
    return options


def run(options: argparse.Namespace, report: Report) -> list[str]:
    """Run the sections, print and write. Return what went wrong, a line for each."""
    sections: dict[str, Any] = {}
    rows: list[Row] = []
    wrong = []
    for name in options.sections:
        print(name, flush=True)
        settings = settings_of(SECTIONS[name].Settings, options, quick=options.quick)
        values = dataclasses.asdict(settings).items()
        named = {key: str(value) if isinstance(value, Path) else value for key, value in values}
        sections[name] = {"settings": plain(named)}
        try:
            found = SECTIONS[name].measure(settings, options.folder)
        except Exception as error:
            traceback.print_exc()
            sections[name]["failed"] = type(error).__name__
            wrong.append(f"{name} failed: {type(error).__name__}")
        else:
            print(*found.rows, sep="\n", flush=True)
            sections[name] |= found.values
            rows += found.rows
            wrong += [
                f"{name}, {row.name}: {row.value} {row.unit} (wanted {row.wanted})"
                for row in found.rows
                if row.missed
            ]
        targets = [dataclasses.asdict(row) | {"missed": row.missed} for row in rows if row.wanted]
        report.write(sections=sections, targets=targets, missed=wrong)
    return wrong


def main() -> int:
    """Run the command line. Return the exit status."""
    options = parse_arguments()
    # Servers are ended in the way of an exception, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    options.folder = (options.folder or Path(tempfile.mkdtemp(prefix="media-"))).absolute()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.quick and options.output is None:
        options.output = options.folder / "media.json"
    name = "-".join(["media", *options.sections] if len(options.sections) == 1 else ["media"])
    report = Report(name, {"quick": options.quick}, options.output)
    print(f"logs: {options.folder}\nresults: {report.path}", flush=True)
    wrong = run(options, report)
    print("missed:" if wrong else "all targets met", *wrong, sep="\n  " if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
