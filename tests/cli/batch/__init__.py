"""``sensorium batch``."""
