"""The components of Colonnade; the root files and `run/` put them together into commands and runs."""

__version__ = "0.1.0"
