"""``make bench-serving``: what the endpoint does under load and under faults, on the real servers."""
