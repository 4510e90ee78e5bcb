"""Checks of ``sensorium doctor``."""
