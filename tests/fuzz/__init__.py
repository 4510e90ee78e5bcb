"""Fuzzing: damaged files of every accepted format, embeddings and requests that nobody should send.

The tests here run a bounded number of examples; ``python -m tests.fuzz`` runs as many as it is told
against a served model (see the README).
"""
