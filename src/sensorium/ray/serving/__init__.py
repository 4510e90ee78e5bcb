"""Replicas of a model behind Ray Serve."""
