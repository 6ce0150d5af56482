"""What a prediction is, and how good it is."""
