"""The parts Colonnade is made of; the root files and `run/` tell how they come together."""

__version__ = "0.1.0"
