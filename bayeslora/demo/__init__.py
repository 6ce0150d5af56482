"""A tiny encoder and a text task with known class probabilities, shipped with the package."""
