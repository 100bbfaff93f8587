"""What a dashboard is made of, and the few forms of query that recur. Must never know Grafana's JSON."""

from __future__ import annotations

from typing import NamedTuple

FRONT = 'job="holdfast-frontend", instance=~"$instance"'
MODEL = f'{FRONT}, model=~"$model"'
WORKER = 'job="holdfast-worker", worker_id=~"$worker"'
RATE = "[$__rate_interval]"
WORKERS_JOB = 'job="holdfast-worker"'


class Panel(NamedTuple):
    """One panel. ``queries``: PromQL by legend."""

    title: str
    help: str
    queries: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    sparse: bool = False
    """Nothing to show in a fleet where nothing went wrong or nobody used the feature."""
    stacked: bool = False


class Dashboard(NamedTuple):
    """One dashboard: rows of panels by their titles, and variables as (name, label, query)."""

    name: str
    title: str
    help: str
    variables: tuple[tuple[str, str, str], ...]
    rows: dict[str, tuple[Panel, ...]]


INSTANCE = ("instance", "Frontend", 'label_values(up{job="holdfast-frontend"}, instance)')
MODELS = ("model", "Model", "label_values(holdfast_frontend_model_usable_workers, model)")
WORKERS = ("worker", "Worker", "label_values(dynamo_component_uptime_seconds, worker_id)")


def rate(metric: str, where: str, by: str) -> str:
    """Return the rate of a counter, summed by labels."""
    return f"sum by ({by}) (rate({metric}{{{where}}}{RATE}))"


def quantiles(metric: str, where: str, by: str = "") -> dict[str, str]:
    """Return median, 95th and 99th percentile of a histogram, by legend."""
    labels = f"{by}, le" if by else "le"
    prefix = f"{{{{{by}}}}} " if by else ""
    inner = f"sum by ({labels}) (rate({metric}_bucket{{{where}}}{RATE}))"
    return {f"{prefix}p{q * 100:g}": f"histogram_quantile({q:g}, {inner})" for q in (0.5, 0.95, 0.99)}


def process(where: str) -> tuple[Panel, ...]:
    """Return the panels about the processes of a job: what the operating system says of them."""
    return (
        Panel(
            "Memory",
            "Resident. It levels off; memory that grows for hours is an alert.",
            {"{{instance}}": f"process_resident_memory_bytes{{{where}}}"},
            "bytes",
        ),
        Panel(
            "Open files",
            "Sockets included, as a share of what the process may have. Above 80 % it is an alert.",
            {"{{instance}}": f"process_open_fds{{{where}}} / process_max_fds{{{where}}}"},
            "percentunit",
        ),
        Panel(
            "CPU",
            "Cores in use. An event loop is one thread: near 1 a frontend is at its end.",
            {"{{instance}}": f"sum by (instance) (rate(process_cpu_seconds_total{{{where}}}{RATE}))"},
        ),
    )


def total(metric: str, where: str, by: str) -> str:
    """Return a gauge, summed by labels."""
    return f"sum by ({by}) ({metric}{{{where}}})"
