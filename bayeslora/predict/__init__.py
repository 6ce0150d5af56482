"""From a posterior to predictions: passes over rows, what they give, and how good it is."""
