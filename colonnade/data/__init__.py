"""The parts of the data pipeline: shards, text filter, tokenization, packing, position, prefetch.

`data_processing.py` at the root assembles them into a stream. Only `feed.py` communicates between ranks: one reader
serves a tensor-parallel group, and `feed.py` broadcasts what it yields.
"""
