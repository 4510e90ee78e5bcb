"""Sensorium on Ray: replicas of an engine, online with Ray Serve and offline with Ray Data.

Needs the extra: ``pip install "sensorium[ray]"``. Nothing here is imported with ``sensorium``.
"""
