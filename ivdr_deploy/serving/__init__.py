"""The endpoint: a core without a server (``core``), one folder for each server around it, and a client."""
