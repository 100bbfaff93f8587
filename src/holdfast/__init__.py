"""Holdfast: serve language models from many machines and never let go of a client's stream."""

__version__ = "0.1.0"
