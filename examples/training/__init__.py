"""What pre-training is worth, measured: ``python -m examples.training``."""
