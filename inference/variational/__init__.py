"""Variational inference: bounds, guides and point estimates."""
