"""Comparing ways to fine-tune one config: what ``tools/benchmark_methods.py`` stands on."""
