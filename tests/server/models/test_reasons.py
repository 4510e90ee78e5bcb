"""Reasons of failures as clients see them: without places on the server."""

from __future__ import annotations

from pathlib import Path

import pytest

from sensorium.server.models.reasons import without_places

HOME = str(Path("~").expanduser())


@pytest.mark.parametrize(
    ("model", "reason", "shown"),
    [
        (
            "/srv/m",
            "Model '/srv/m': /srv/m/config.json is bad.",
            "Model 'public': public/config.json is bad.",
        ),
        ("~/m", f"Model '{HOME}/m': it is bad.", "Model 'public': it is bad."),
        (".", "Model '.': it is bad. See 1.5.", "Model 'public': it is bad. See 1.5."),
        ("a/b", "Model 'a/b': no such id a/b.", "Model 'public': no such id public."),
        ("demo", "a demo of 'demo' at /a/b c.", "a demo of 'public' at b c."),
        (
            "x",
            "'/srv/my models/x.gguf' and/or https://host/a/b",
            "'x.gguf' and/or https://host/a/b",
        ),
        ("x", "/dev/shm is full; GET /v1/models", "/dev/shm is full; GET /v1/models"),
    ],
)
def test_places_stay_on_the_server(model: str, reason: str, shown: str) -> None:
    assert without_places(reason, model, "public") == shown
