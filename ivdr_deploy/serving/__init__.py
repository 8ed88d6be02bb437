"""The endpoint: a server-free core (``service``), and the real TorchServe around it (``server``)."""
