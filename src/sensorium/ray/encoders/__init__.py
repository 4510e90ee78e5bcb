"""Encoders apart from engines: replicas with a model's towers alone, which encode media."""
