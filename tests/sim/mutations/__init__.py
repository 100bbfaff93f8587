"""Bugs that are planted into production code on purpose, to learn whether the simulation would notice them."""
