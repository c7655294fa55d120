"""What a training step costs, by variant: what ``benchmark_training.py`` stands on."""
