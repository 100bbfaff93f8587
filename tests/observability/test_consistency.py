"""Rules, dashboards, runbooks and the metric catalogue speak of the same things. Needs no program of Prometheus'."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from holdfast.telemetry.catalogue import CATALOGUE
from tests.observability.binaries import HERE, ROOT

RULES = ("objectives.yml", "alerts.yml")
SEVERITIES = {"critical", "warning", "none"}
SUFFIXES = {"histogram": ("_bucket", "_count", "_sum"), "counter": ("",), "gauge": ("",)}
KNOWN = {f"{m.name}{suffix}": m for m in CATALOGUE for suffix in SUFFIXES[m.kind]}
NAME = re.compile(r"\b(?:dynamo|holdfast|process|model:holdfast)[a-z0-9_:]*[a-z0-9]\b")


def rules() -> Iterator[dict[str, Any]]:
    for name in RULES:
        content = yaml.safe_load((HERE / "rules" / name).read_text(encoding="utf-8"))
        for group in content["groups"]:
            yield from group["rules"]


ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}
RECORDED = {rule["record"] for rule in rules() if "record" in rule}
BOARDS = sorted((HERE / "grafana").glob("*.json"))


def expressions() -> Iterator[tuple[str, str]]:
    """Yield (where, PromQL) of every rule, annotation query and panel."""
    for rule in rules():
        where = rule.get("alert") or rule["record"]
        yield where, rule["expr"]
        for text in rule.get("annotations", {}).values():
            yield from ((where, query) for query in re.findall(r'(?:query|printf) "((?:[^"\\]|\\.)*)"', text))
    for board in BOARDS:
        for panel in json.loads(board.read_text(encoding="utf-8"))["panels"]:
            yield from ((f"{board.name}: {panel['title']}", t["expr"]) for t in panel.get("targets", []))


def names(expr: str) -> set[str]:
    """Return the metrics of ours that an expression reads; label values and strings are left out."""
    return set(NAME.findall(re.sub(r'"(?:[^"\\]|\\.)*"', "", re.sub(r'\\"', '"', expr)))) - _labels(expr)


def _labels(expr: str) -> set[str]:
    return set(re.findall(r"\b(dynamo_(?:endpoint|namespace|component))\b", expr))


def test_every_metric_that_is_asked_for_exists() -> None:
    unknown = [
        (where, n) for where, expr in expressions() for n in names(expr) if n not in KNOWN | dict.fromkeys(RECORDED)
    ]
    assert unknown == []


def test_labels_that_are_matched_exist() -> None:
    """A matcher on a label that a metric does not have never matches, and an alert on it never fires."""
    everywhere = {"job", "instance", "le"}
    wrong = []
    for where, expr in expressions():
        for name, matchers in re.findall(r"\b([a-z_:0-9]+)\{([^{}]*)\}", re.sub(r'\\"', '"', expr)):
            if name in KNOWN:
                asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
                wrong += [(where, name, label) for label in asked - everywhere - set(KNOWN[name].labels)]
    assert wrong == []


def test_the_parser_of_this_test_sees_metrics() -> None:
    found = set().union(*(names(expr) for _, expr in expressions()))
    assert {"holdfast_frontend_workers", "dynamo_frontend_requests_total", "holdfast:slo_all:total"} <= found
    assert len(found) > 50


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_how_bad_it_is_and_what_to_do(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in SEVERITIES
    assert {"summary", "description", "runbook"} <= set(rule["annotations"])
    page = ROOT / rule["annotations"]["runbook"]
    assert page.is_file(), f"{page} is missing"
    headings = re.findall(r"^## (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert any(h.startswith("What you see") for h in headings), headings
    assert any(h.startswith("What to") or "what to do" in h for h in headings), headings


@pytest.mark.parametrize("name", ALERTS)
def test_the_runbook_knows_its_alert(name: str) -> None:
    page = (ROOT / ALERTS[name]["annotations"]["runbook"]).read_text(encoding="utf-8")
    index = (HERE / "README.md").read_text(encoding="utf-8")
    assert name in page or name in index


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_has_a_unit_test(name: str) -> None:
    written = "".join(path.read_text(encoding="utf-8") for path in (HERE / "tests").glob("*.yml"))
    assert name in written or any(re.fullmatch(p, name) for p in re.findall(r'alertname=~"([^"]+)"', written))


def test_inhibition_speaks_of_alerts_that_exist() -> None:
    config = yaml.safe_load((HERE / "alertmanager.yml").read_text(encoding="utf-8"))
    wrong = []
    for rule in config["inhibit_rules"]:
        for matcher in (*rule["source_matchers"], *rule["target_matchers"]):
            pattern = re.fullmatch(r'alertname =~? "(.+)"', matcher)
            assert pattern, matcher
            wrong += [p for p in pattern.group(1).split("|") if not any(re.fullmatch(p, name) for name in ALERTS)]
    assert wrong == []


def test_dashboards_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "tools/dashboards.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout.strip()}; run `python tools/dashboards.py`\n{done.stderr[-1000:]}"


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_a_dashboard_can_be_imported(path: Any) -> None:
    """What Grafana refuses or garbles: clashing ids, panels over each other, unknown variables."""
    board = json.loads(path.read_text(encoding="utf-8"))
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    known = {variable["name"] for variable in board["templating"]["list"]} | {"__rate_interval"}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board["panels"])))
    assert used <= known
    assert known - used <= {"datasource"}
