"""Deterministic simulation of a whole cluster: production code on a virtual clock, network and discovery."""
