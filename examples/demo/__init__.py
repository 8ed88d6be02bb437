"""The whole journey on small videos: ``python -m examples.demo``."""
