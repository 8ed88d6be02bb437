"""Training: ``python -m train ...`` from a checkout; not part of the installed package."""
