"""A run from start to end, and the use of its results: what the commands in the root folder share."""
