"""Complete programs built on the package."""
