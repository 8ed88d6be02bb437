"""Measures what a model costs on a machine: by stage, against torch, with the limits beside it."""
