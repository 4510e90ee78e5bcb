"""``python -m sensorium.entrypoints.openai.api_server --model M`` is ``sensorium serve M``."""

from __future__ import annotations

import sys
import warnings

from sensorium.cli.main import main

if __name__ == "__main__":
    warnings.warn(
        "this module is deprecated: use 'sensorium serve MODEL'",
        DeprecationWarning,
        stacklevel=1,
    )
    sys.exit(main(["serve", *sys.argv[1:]]))
