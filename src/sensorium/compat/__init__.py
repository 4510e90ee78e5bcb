"""What users of vLLM bring along: its flags, fields of requests and paths, each with what becomes of it here.

The tables are data; ``docs/from_vllm.md`` is made of them.
"""
