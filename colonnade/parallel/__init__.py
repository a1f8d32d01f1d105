"""Tensors over ranks: the mesh, the collectives and their order of sums, sharded parameters, vocabulary and loss."""
