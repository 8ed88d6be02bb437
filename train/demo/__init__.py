"""The whole journey on small videos: ``python -m train.demo``."""
