"""A run from its start to its end, and what is made of it: the parts that the commands in the root folder share."""
