"""The baselines of the field: dropout at prediction, checkpoints, ensembles, a temperature."""
