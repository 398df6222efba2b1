"""The model server: HTTP, access, limits, metrics and loading around the engine, on KServe's server."""
