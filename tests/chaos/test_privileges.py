"""What needs root says so plainly where it is not allowed; what it does where it is, `tests/faults` shows."""

from __future__ import annotations

import ipaddress
import random
from pathlib import Path

import pytest

from holdfast.chaos.memory import CannotLimit, MemoryLimit
from holdfast.chaos.namespaces import CannotSeparate, Namespace


def test_no_memory_controller(tmp_path: Path) -> None:
    with pytest.raises(CannotLimit, match="memory controller is not enabled"):
        MemoryLimit("mine", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_control_groups_at_all(tmp_path: Path) -> None:
    with pytest.raises(CannotLimit, match="cannot be made"):
        MemoryLimit("mine", tmp_path / "nowhere")


def test_a_group_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    with pytest.raises(CannotLimit, match="cannot be made"):
        MemoryLimit("theirs", tmp_path)
    assert (tmp_path / "theirs").is_dir()


def test_a_process_is_held(tmp_path: Path) -> None:
    """First the bound, then the process: a system that grants files stands in for the kernel."""
    group = tmp_path / "memory" / "mine"

    class Granting(type(tmp_path)):  # type: ignore[misc]
        def mkdir(self, *args: object, **how: object) -> None:
            super().mkdir(*args, **how)
            (Path(self) / "memory.limit_in_bytes").write_text("")

    (tmp_path / "memory").mkdir()
    limit = MemoryLimit("mine", Granting(tmp_path))
    limit.hold(4711, 1 << 20)
    assert (group / "memory.limit_in_bytes").read_text() == str(1 << 20)
    assert (group / "cgroup.procs").read_text() == "4711"


async def test_no_ip_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotSeparate, match="no `ip` command"):
        await Namespace(random.Random(1)).start()


def test_addresses_are_a_pair_of_their_own() -> None:
    for seed in range(200):
        made = Namespace(random.Random(seed))
        network = ipaddress.ip_network(f"{made.inside}/30", strict=False)
        assert [str(host) for host in network.hosts()] == [made.outside, made.inside]
        assert len(made.name) <= 16
        assert network.subnet_of(ipaddress.ip_network("10.213.0.0/16"))
