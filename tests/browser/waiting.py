"""Waiting for what a page shows.

Playwright's ``wait_for_function`` evaluates text inside the page, which its policy forbids.
"""

from __future__ import annotations

import time
from typing import Any

SECONDS = 120
STEP_MS = 25


def until(page: Any, expression: str, argument: Any = None) -> None:
    """Return when a JavaScript expression or function is true in the page."""
    deadline = time.monotonic() + SECONDS
    while not page.evaluate(expression, argument):
        assert time.monotonic() < deadline, f"not within {SECONDS} s: {expression}"
        page.wait_for_timeout(STEP_MS)
