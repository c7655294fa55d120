# Full fine-tuning: the config as it is.
backbone = None
