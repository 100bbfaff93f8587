"""The stand-alone router: it knows every worker's caches and load, for others to ask or to route through."""
