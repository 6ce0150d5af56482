"""The baselines of the field: LoRA+, AdaLoRA, dropout at prediction, checkpoints, ensembles, a temperature."""
