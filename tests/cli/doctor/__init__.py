"""Tests of ``sensorium doctor``."""
