"""The service behind an HTTP server of its own: FastAPI on uvicorn, in one process with the engine."""
