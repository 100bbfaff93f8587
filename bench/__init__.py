"""Benchmarks: what a token, a request and a move to another worker cost. `python -m bench` prints one table."""
