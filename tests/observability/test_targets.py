"""targets.py: what Prometheus is told about workers, and what it is told while nobody knows."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import types
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from holdfast.base.ids import Epoch, InstanceId
from holdfast.runtime.discovery.contract import Discovery, InstanceRecord
from tests.observability.binaries import HERE


def script() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("targets", HERE / "targets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TARGETS = script()


class View:
    """What a discovery backend would show."""

    def __init__(self, *records: InstanceRecord):
        self.records = list(records)
        self.reachable = True

    def snapshot(self) -> list[InstanceRecord]:
        return self.records


def worker(name: str, system_address: str | None, namespace: str = "dynamo") -> InstanceRecord:
    return InstanceRecord(
        namespace=namespace,
        component="backend",
        endpoints=("generate",),
        instance=cast("InstanceId", name),
        epoch=cast("Epoch", 1),
        address="127.0.0.1:1",
        system_address=system_address,
    )


def targets(view: View) -> Any:
    return TARGETS.Targets(cast("Discovery", view), "dynamo", ["127.0.0.1:8000"])


def test_workers_are_named_by_their_status_servers() -> None:
    view = View(
        worker("a", "127.0.0.1:9002"), worker("b", "127.0.0.1:9001"), worker("c", None), worker("d", "x:1", "other")
    )
    found = targets(view).now()
    assert found["workers"] == [{"targets": ["127.0.0.1:9001"]}, {"targets": ["127.0.0.1:9002"]}]
    assert found["frontends"] == [{"targets": ["127.0.0.1:8000"]}]


def test_unknown_is_not_dead() -> None:
    view = View(worker("a", "127.0.0.1:9002"))
    known = targets(view)
    before = known.now()
    view.reachable, view.records = False, []
    assert known.now() == before
    view.reachable = True
    assert known.now()["workers"] == []


def test_files_change_only_with_their_content(tmp_path: Path) -> None:
    view = View(worker("a", "127.0.0.1:9002"))
    known = targets(view)
    TARGETS.write(known, tmp_path / "targets")
    path = tmp_path / "targets" / "workers.json"
    first = path.stat().st_ino
    TARGETS.write(known, tmp_path / "targets")
    assert path.stat().st_ino == first
    view.records = []
    TARGETS.write(known, tmp_path / "targets")
    assert json.loads(path.read_text(encoding="utf-8")) == []
    assert sorted(p.name for p in path.parent.iterdir()) == ["frontends.json", "supervisors.json", "workers.json"]


async def test_prometheus_can_ask_over_http() -> None:
    server = await TARGETS.listen(targets(View(worker("a", "127.0.0.1:9002"))), "127.0.0.1:0")
    port = server.sockets[0].getsockname()[1]
    async with server, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        answer = await http.get("/workers")
        assert answer.headers["content-type"] == "application/json"
        assert answer.json() == [{"targets": ["127.0.0.1:9002"]}]
        assert (await http.get("/other")).status_code == 404


@pytest.mark.parametrize("rude", [b"", b"\r\n\r\n", b"GET\r\n\r\n", b"x" * 20_000])
async def test_rude_clients_harm_nobody(rude: bytes) -> None:
    server = await TARGETS.listen(targets(View()), "127.0.0.1:0")
    port = server.sockets[0].getsockname()[1]
    async with server:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(rude)
        writer.write_eof()
        async with asyncio.timeout(10):
            await reader.read()
        writer.close()
        async with httpx.AsyncClient() as http:
            assert (await http.get(f"http://127.0.0.1:{port}/frontends")).status_code == 200
