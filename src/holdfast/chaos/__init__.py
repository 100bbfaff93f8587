"""Fault injection into real processes: what the simulation does to simulated ones. Must never import the simulation."""
