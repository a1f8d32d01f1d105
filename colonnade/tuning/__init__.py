"""Micro-batch autotuner, and memory and FLOP accounting."""
