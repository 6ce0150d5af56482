"""Posteriors around what point training found: by its own trajectory, or by how much noise it bears."""
