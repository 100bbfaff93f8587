"""Every metric of Holdfast: the one place where names, labels, units and meanings are fixed.

Names that Dynamo's users know keep their meaning; ours begin with ``holdfast_``. The page `docs/reference/metrics.md`
and the objects that processes feed are both made from here: a name that nothing feeds is not listed. The lines stand
in `frontend_metrics` and `worker_metrics`.

Must never hold behaviour.
"""

from __future__ import annotations

from holdfast.telemetry.frontend_metrics import FAULTS, MODELS, PLANE, QUEUE, REQUESTS, STANDING, WORKERS_SEEN
from holdfast.telemetry.knowledge_metrics import KNOWLEDGE
from holdfast.telemetry.metric import Metric
from holdfast.telemetry.process_metrics import PROCESS, SUPERVISION
from holdfast.telemetry.router_metrics import ROUTING
from holdfast.telemetry.routerd_metrics import STANDALONE
from holdfast.telemetry.worker_metrics import ENGINE, HANDLER, KV_EVENTS, LEAVING

CATALOGUE: tuple[Metric, ...] = (
    *REQUESTS, *QUEUE, *FAULTS, *MODELS, *WORKERS_SEEN, *KNOWLEDGE, *ROUTING, *STANDING, *PLANE,
    *HANDLER, *ENGINE, *KV_EVENTS, *LEAVING, *STANDALONE, *SUPERVISION, *PROCESS,
)  # fmt: skip

SECTIONS: tuple[tuple[str, tuple[Metric, ...]], ...] = (
    ("Requests", REQUESTS),
    ("Waiting for room", QUEUE),
    ("Migration, cancellation, rejection, leases", FAULTS),
    ("Models", MODELS),
    ("Workers as a frontend sees them", WORKERS_SEEN),
    ("What a frontend knows of KV caches", KNOWLEDGE),
    ("Routing by KV caches", ROUTING),
    ("A frontend's own standing", STANDING),
    ("Request plane, transport and event loop", PLANE),
    ("A worker's calls", HANDLER),
    ("A worker's engine", ENGINE),
    ("A worker's KV cache", KV_EVENTS),
    ("A worker that leaves", LEAVING),
    ("A stand-alone router", STANDALONE),
    ("A supervisor", SUPERVISION),
    ("Every process", PROCESS),
)


def metrics_page() -> str:
    """Return the tables of `docs/reference/metrics.md`."""
    parts = []
    for title, metrics in SECTIONS:
        parts.append(f"## {title}\n")
        parts.append("| metric | type | labels | unit | process | meaning |\n|---|---|---|---|---|---|")
        parts += [_row(metric) for metric in metrics]
        parts.append("")
    return "\n".join(parts)


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    origin = {"seed": "", "newer": " (newer releases)", "holdfast": " (Holdfast's own)", "client": ""}[metric.origin]
    also = f" Also as `{metric.also}`." if metric.also else ""
    facts = (f"`{metric.name}`", metric.kind, labels, metric.unit, metric.process, f"{metric.help}{also}{origin}")
    return f"| {' | '.join(facts)} |"
