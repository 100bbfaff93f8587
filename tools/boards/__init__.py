"""What the Grafana dashboards show; `tools/dashboards.py` makes JSON of it."""
