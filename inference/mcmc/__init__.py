"""Markov chains: samplers of the posterior and what they leave."""
