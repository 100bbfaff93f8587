"""What Prometheus' own checkers say about the configuration, the rules and the rules' unit tests."""

from __future__ import annotations

import pytest

from tests.observability.binaries import HERE, check

pytestmark = pytest.mark.operations
CONFIGS = ("prometheus.yml", "examples/prometheus-dns.yml", "examples/prometheus-http.yml")


@pytest.mark.parametrize("config", CONFIGS)
def test_prometheus_accepts_the_configuration(config: str) -> None:
    assert "SUCCESS" in check("promtool", "check", "config", "--lint-fatal", config)


def test_prometheus_accepts_the_rules() -> None:
    said = check("promtool", "check", "rules", "--lint-fatal", *(f"rules/{p.name}" for p in (HERE / "rules").iterdir()))
    assert said.count("SUCCESS") == 2


@pytest.mark.parametrize("path", sorted((HERE / "tests").glob("*.yml")), ids=lambda path: path.stem)
def test_the_rules_do_what_they_are_for(path: object) -> None:
    assert "SUCCESS" in check("promtool", "test", "rules", str(path), within=110)


def test_alertmanager_accepts_the_configuration() -> None:
    assert "SUCCESS" in check("amtool", "check-config", "alertmanager.yml")


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [
        (("alertname=HoldfastNoUsableWorker", "severity=critical"), "pager"),
        (("alertname=HoldfastWorkerOut", "severity=warning"), "tickets"),
        (("alertname=HoldfastWatchdog", "severity=none"), "dead-mans-switch"),
    ],
)
def test_alerts_reach_their_receiver(labels: tuple[str, ...], receiver: str) -> None:
    said = check("amtool", "config", "routes", "test", "--config.file=alertmanager.yml", *labels)
    assert said.splitlines()[0] == receiver
