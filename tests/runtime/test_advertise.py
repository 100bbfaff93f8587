"""Which address a worker publishes: never one that means another machine elsewhere."""

from __future__ import annotations

import asyncio
import random
import socket

import pytest

from holdfast.base.settings import InvalidSetting
from holdfast.engines.mock import MockConfig, MockEngine
from holdfast.runtime import advertise
from holdfast.runtime.advertise import published_address
from holdfast.runtime.discovery.mem import MemDiscovery, MemHub
from holdfast.worker.config import WorkerConfig
from holdfast.worker.process import WorkerProcess


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What this machine knows about itself."""
    known = {"route": "", "name": ""}
    monkeypatch.setattr(advertise, "_of_default_route", lambda _family: known["route"])
    monkeypatch.setattr(advertise, "_of_own_name", lambda _family: known["name"])
    return known


@pytest.mark.parametrize(
    ("bound", "wanted", "published"),
    [
        ("10.0.0.1:7000", "", "10.0.0.1:7000"),
        ("127.0.0.1:7000", "", "127.0.0.1:7000"),
        ("0.0.0.0:7000", "gpu-7:9000", "gpu-7:9000"),
        ("0.0.0.0:7000", "gpu-7", "gpu-7:7000"),
        ("[::]:7000", "2001:db8::7", "[2001:db8::7]:7000"),
        ("[::]:7000", "[2001:db8::7]:9", "[2001:db8::7]:9"),
    ],
)
def test_what_was_said_or_bound_is_published(bound: str, wanted: str, published: str) -> None:
    assert published_address(bound, wanted) == published


def test_bound_everywhere_the_default_routes_address_is_published_then_that_of_the_name(
    machine: dict[str, str],
) -> None:
    machine.update(route="10.1.2.3", name="10.9.9.9")
    assert published_address("0.0.0.0:7000", "") == "10.1.2.3:7000"
    machine["route"] = ""
    assert published_address("0.0.0.0:7000", "") == "10.9.9.9:7000"
    assert published_address("[::]:7000", "") == "10.9.9.9:7000"


def test_without_any_it_says_what_to_do(machine: dict[str, str]) -> None:
    with pytest.raises(InvalidSetting, match="DYN_WORKER_ADVERTISE"):
        published_address("0.0.0.0:7000", "")


def test_loopback_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    loopback = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(advertise, "_of_default_route", lambda _family: "")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: loopback)
    with pytest.raises(InvalidSetting):
        published_address("0.0.0.0:7000", "")


def test_the_default_route_is_asked_without_sending_anything() -> None:
    found = advertise._of_default_route(socket.AF_INET)
    assert found == "" or not found.startswith(("127.", "0."))


async def test_a_worker_that_listens_everywhere_is_found(machine: dict[str, str]) -> None:
    machine["route"] = "127.0.0.1"  # reachable from this test
    hub = MemHub()
    watcher = MemDiscovery(hub)
    await watcher.start()
    config = WorkerConfig(engine="mock", rpc_host="0.0.0.0", insecure=True)
    worker = WorkerProcess(config, MockEngine(MockConfig()), MemDiscovery(hub), random.Random(5))
    running = asyncio.create_task(worker.run())
    async with asyncio.timeout(20):
        await worker.ready.wait()
    (record,) = watcher.snapshot()
    assert record.address == f"127.0.0.1:{worker.server.address.rpartition(':')[2]}"
    worker.stop()
    await asyncio.wait_for(running, 10)
    await watcher.close()
