"""The HTTP process: routes, streaming, the registry of models."""
