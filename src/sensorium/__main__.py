"""``python -m sensorium`` is the command ``sensorium``."""

from __future__ import annotations

import sys

from sensorium.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
