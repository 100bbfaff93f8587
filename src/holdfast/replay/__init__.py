"""Load from recorded traces, for real clusters and for simulated ones, and what came of it."""
