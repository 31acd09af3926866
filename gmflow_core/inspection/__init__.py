"""What a mixture believes along a trajectory: kept (trace), measured (beliefs, statistics), drawn (all the others)."""
