"""The endpoint without a server: requests in, one answer for each out."""
