"""``make bench-scoring``: how fast collections are scored, and whether kills lose anything."""
