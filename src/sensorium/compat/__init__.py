"""vLLM's flags, keywords, request fields and paths, and their meaning in Sensorium.

The tables are data; ``docs/from_vllm.md`` is generated from them.
"""
