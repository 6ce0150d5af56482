"""Laplace's approximation: curvature, evidence, and the network that is linear in its weights."""
