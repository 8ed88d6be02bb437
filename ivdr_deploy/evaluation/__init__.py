"""How good answers are, and whether two runtimes give the same ones."""
