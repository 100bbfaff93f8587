"""What `holdfast status` shows of workers that are there and get nothing."""

from __future__ import annotations

import pytest

from holdfast.base.ids import Epoch, InstanceId
from holdfast.cli.status import FrontendStatus, Status, _print
from holdfast.runtime.discovery.contract import InstanceRecord


def seen(instance: str, state: str, problem: str) -> dict[str, str]:
    return {"instance_id": instance, "state": state, "problem": problem}


def test_a_refused_worker_is_not_shown_as_usable_and_the_reason_stands_below(
    capsys: pytest.CaptureFixture[str],
) -> None:
    records = [
        InstanceRecord(
            "dynamo", "backend", ("generate",), InstanceId(name * 16), Epoch(1), "127.0.0.1:1", state="ready"
        )
        for name in "abc"
    ]
    refused = "refused for model 'mock': its context_length (1) is not that of worker aaaaaaaaaaaaaaaa (4096)"
    views = [seen("a" * 16, "usable", ""), seen("b" * 16, "refused", refused), seen("c" * 16, "stalled", "it says so")]
    frontends = [FrontendStatus(f"http://127.0.0.1:{port}", "healthy", "", {"mock": 1}, views) for port in (8000, 8001)]
    _print(Status(True, frontends, records, []))
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line[:16] in {"a" * 16, "b" * 16, "c" * 16}}
    assert [rows[name * 16][2] for name in "abc"] == ["usable", "refused", "stalled"]
    assert out.count(f"worker {'b' * 16}: {refused}") == 1, "two frontends agree: said once"
    assert f"worker {'c' * 16}: it says so" in out
    assert f"worker {'a' * 16}:" not in out


def test_frontends_of_an_older_version_say_nothing_about_it(capsys: pytest.CaptureFixture[str]) -> None:
    old = FrontendStatus("http://127.0.0.1:8000", "healthy", "", {"mock": 1}, [{"instance_id": "a" * 16}])
    record = InstanceRecord("dynamo", "backend", ("generate",), InstanceId("a" * 16), Epoch(1), "127.0.0.1:1")
    _print(Status(True, [old], [record], []))
    assert "127.0.0.1:1" in capsys.readouterr().out
