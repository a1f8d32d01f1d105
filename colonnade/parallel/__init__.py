"""How one model is cut over ranks: the mesh, the conjugate collectives, the sharding table, the vocabulary."""
