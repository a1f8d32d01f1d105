"""The data plane's parts: shards, text filter, tokenization, packing, position, prefetch.

`data_processing.py` at the root puts them together into a stream. Nothing in here knows of ranks: one reader serves a
tensor-parallel group, and what it yields is broadcast elsewhere.
"""
