"""The typed client of an endpoint: when to send again, what an answer means, and the two clients."""
