"""Tests of ``sensorium chat``."""
