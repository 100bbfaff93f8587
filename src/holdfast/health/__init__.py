"""Health: readiness rules, canaries, the watch over the engine, the status server."""
