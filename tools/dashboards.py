"""Writes the Grafana dashboards of deploy/observability/grafana from the descriptions in tools/boards.

``python tools/dashboards.py`` writes them, ``--check`` only says whether they are up to date. What a panel asks is
run against a real Prometheus by tests/observability.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from boards import faults, frontend, workers
from boards.panel import Dashboard, Panel

GRAFANA = Path(__file__).resolve().parent.parent / "deploy" / "observability" / "grafana"
SCHEMA = 38
"""Of Grafana 10; newer ones migrate it by themselves."""
WIDTH, HEIGHT = 24, 8
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
DASHBOARDS = (frontend.BOARD, workers.BOARD, faults.BOARD)


def panels(board: Dashboard) -> Iterator[dict[str, Any]]:
    """Yield a dashboard's panels as Grafana has them: rows as headings, panels from left to right."""
    number, y = 0, 0
    for heading, row in board.rows.items():
        number += 1
        place = {"h": 1, "w": WIDTH, "x": 0, "y": y}
        yield {"id": number, "type": "row", "title": heading, "collapsed": False, "gridPos": place, "panels": []}
        x, y = 0, y + 1
        for panel in row:
            if x + panel.width > WIDTH:
                x, y = 0, y + HEIGHT
            number += 1
            yield {"id": number, "gridPos": {"h": HEIGHT, "w": panel.width, "x": x, "y": y}, **_panel(panel)}
            x += panel.width
        y += HEIGHT


def _panel(panel: Panel) -> dict[str, Any]:
    instant = panel.kind in ("stat", "table")
    targets = [
        {
            "refId": chr(ord("A") + i),
            "datasource": DATASOURCE,
            "expr": expr,
            "legendFormat": legend or "__auto",
            "instant": instant,
            "range": not instant,
            "format": "table" if panel.kind == "table" else "time_series",
        }
        for i, (legend, expr) in enumerate(panel.queries.items())
    ]
    look: dict[str, Any] = {}
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stacked else "none"}
        look = {"custom": {"fillOpacity": 30 if panel.stacked else 5, "showPoints": "never", "stacking": stacking}}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "datasource": DATASOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit, **look}, "overrides": []},
        "options": _options(panel.kind),
    }


def _options(kind: str) -> dict[str, Any]:
    if kind == "timeseries":
        return {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}
    if kind == "stat":
        return {"reduceOptions": {"calcs": ["lastNotNull"]}, "textMode": "value_and_name"}
    return {"showHeader": True}


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def render(board: Dashboard) -> str:
    """Return a dashboard as Grafana imports it."""
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    links = [{"type": "dashboards", "tags": ["holdfast"], "title": "Holdfast", "asDropdown": True}]
    content = {
        "uid": f"holdfast-{board.name}",
        "title": board.title,
        "description": board.help,
        "tags": ["holdfast"],
        "schemaVersion": SCHEMA,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "links": links,
        "templating": {"list": [source, *(_variable(*variable) for variable in board.variables)]},
        "panels": list(panels(board)),
    }
    return json.dumps(content, indent=2) + "\n"


def main(check: bool) -> int:
    """Write the dashboards, or name those that are out of date."""
    stale = []
    for board in DASHBOARDS:
        path, text = GRAFANA / f"{board.name}.json", render(board)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
            if not check:
                GRAFANA.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    print(f"{'out of date' if check else 'written'}: {', '.join(stale) or 'none'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
