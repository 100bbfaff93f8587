"""Universes: production code in them, replayed bit for bit, also by another process, and nothing stays behind."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.sim.hosts import Host
from holdfast.sim.tape import Tape
from holdfast.sim.world import World
from tests.sim.serving import TOKENS, Serving, life
from tests.sim.worlds import passes, universe

ROOT = Path(__file__).resolve().parent.parent.parent


def test_production_streams_run_through_a_quiet_universe() -> None:
    with universe() as world:
        serving = Serving(world, callers=3, streams=40)
        assert world.run(lambda: serving.over, 60.0)
        serving.check()
        assert {stream.final for stream in serving.streams} == {"end:stop"}
        assert serving.worker.server.open_streams == 0


@pytest.mark.parametrize("seed", range(12))
def test_production_streams_survive_or_break_cleanly(seed: int) -> None:
    _, finals, _ = life(seed)
    assert len(finals) == 50
    assert finals.count("end:stop") >= 20
    assert set(finals) <= {"end:stop", "broken:disconnected"}


def test_a_short_freeze_only_delays() -> None:
    with universe() as world:
        serving = Serving(world)
        passes(world, 0.5)
        serving.worker.host.freeze()
        passes(world, 1.0)
        serving.worker.host.thaw()
        world.run(lambda: serving.over, 60.0)
        serving.check()
        assert {stream.final for stream in serving.streams} == {"end:stop"}
        gaps = [b - a for s in serving.streams for a, b in zip(s.arrivals, s.arrivals[1:], strict=False)]
        assert 0.99 < max(gaps) < 1.1


def test_a_reset_breaks_the_streams_of_that_caller_only() -> None:
    with universe() as world:
        serving = Serving(world)
        passes(world, 1.0)
        world.network.reset("worker", "caller0")
        world.run(lambda: serving.over, 60.0)
        serving.check()
        first, second = ([stream.final for stream in caller.streams] for caller in serving.callers)
        assert "broken:disconnected" in first
        assert serving.callers[0].lost == ["disconnected"]
        assert set(second) == {"end:stop"}


def test_a_crash_breaks_all_streams_at_once() -> None:
    with universe() as world:
        serving = Serving(world)
        passes(world, 1.0)
        serving.worker.host.crash()
        passes(world, 0.1)
        assert all(stream.final == "broken:disconnected" for stream in serving.streams if len(stream.tokens) < TOKENS)


def test_the_same_seed_is_the_same_universe_and_others_are_others() -> None:
    assert life(3) == life(3)
    assert len({life(seed)[0] for seed in range(8)}) == 8


def digests(hash_seed: str) -> str:
    command = [sys.executable, "-m", "tests.sim.serving", "3", "4"]
    env = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout


def test_another_process_lives_the_same_universe() -> None:
    first = digests("0")
    assert len(first.split()) == 2
    assert first == digests("0")


def test_a_recorded_tape_replays_its_universe() -> None:
    def run(tape: Tape) -> str:
        world = World(tape)
        try:
            serving = Serving(world, streams=10)
            world.run(lambda: serving.over, 60.0)
            return world.digest()
        finally:
            world.close()

    first = Tape(11)
    digest = run(first)
    names = {"network": first.choices["network"], "schedule": first.choices["schedule"]}
    assert run(Tape(11, names)) == digest
    plain = Tape(11, {"network": [], "schedule": []})
    assert run(plain) != digest, "everything plain is another universe, and it runs too"


def test_notes_are_in_the_log_and_in_the_digest() -> None:
    def digest(fact: int) -> str:
        with universe() as world:
            world.note("planted", fact=fact)
            assert str(world.log[-1]) == f"  0.000000 planted fact={fact}"
            return world.digest()

    assert digest(1) == digest(1)
    assert digest(1) != digest(2)


def test_tasks_of_the_harness_outlive_every_fault() -> None:
    with universe() as world:
        host = world.boot("a")
        seen: list[float] = []

        async def watch() -> None:
            host.freeze()
            await asyncio.sleep(1)
            host.crash()
            await asyncio.sleep(1)
            seen.append(world.now())

        world.spawn(watch(), "watch")
        world.run()
        assert seen == [2.0]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def mini(seed: int) -> None:
    """A short universe with production streams and a host that dies in the middle."""
    world = World(Tape(seed))
    try:
        serving = Serving(world, callers=1, streams=4)
        passes(world, 0.3)
        serving.worker.host.crash(silent=seed % 2 == 0)
        passes(world, 0.2)
    finally:
        world.close()


def test_universes_leave_nothing_behind() -> None:
    for seed in range(20):
        mini(seed)
    gc.collect()
    objects, bytes_before = len(gc.get_objects()), resident_bytes()
    for seed in range(300):
        mini(seed)
    gc.collect()
    assert len(gc.get_objects()) - objects < 300
    assert not [one for one in gc.get_objects() if isinstance(one, (World, Host))]
    assert resident_bytes() - bytes_before < 8_000_000


def test_the_collector_is_as_it_was() -> None:
    assert gc.isenabled()
    with universe():
        assert not gc.isenabled()
        with universe(2):
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
