"""Tests of sensorium.multimodal."""
