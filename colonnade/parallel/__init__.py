"""Everything that depends on ranks: the mesh, the collectives, and how parameters and layers are sharded."""
