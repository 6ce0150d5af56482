"""What is read of a network's output, and how labels follow from it."""
