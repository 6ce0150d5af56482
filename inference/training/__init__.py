"""Minimising a loss over batches: the Trainer, the order of the rows, and what it does to the process."""
