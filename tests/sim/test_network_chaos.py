"""The network under random faults: what TCP promises holds in every universe."""

from __future__ import annotations

import asyncio
import random

import pytest

from holdfast.sim.links import NetworkSettings
from holdfast.sim.world import World
from tests.sim.worlds import Pair, passes, universe

FAULTS = ("partition", "one way", "other way", "freeze", "delay", "pause", "slow")
ENDINGS = ("none", "none", "close", "abort", "reset", "kill", "power")


class Chatter:
    """A pair whose ends write at random, and a record of what each has written."""

    def __init__(self, world: World, rng: random.Random):
        self.world, self.rng = world, rng
        self.pair = Pair(world).connect()
        self.sent = {"near": bytearray(), "far": bytearray()}
        self.tasks = [
            self.pair.near_host.spawn(self.talk("near"), "talk"),
            self.pair.far_host.spawn(self.talk("far"), "talk"),
        ]

    def end(self, name: str) -> object:
        return self.pair.near if name == "near" else self.pair.far

    async def talk(self, name: str) -> None:
        end = self.pair.near if name == "near" else self.pair.far
        for _ in range(60):
            if end.stream.is_closing():
                return
            data = self.rng.randbytes(self.rng.choice([1, 50, 5_000, 60_000]))
            self.sent[name] += data
            end.stream.write(data)
            await asyncio.sleep(self.rng.choice([0.0, 0.001, 0.05]))

    async def trouble(self) -> None:
        """Faults that end again."""
        network, rng = self.world.network, self.rng
        for _ in range(6):
            await asyncio.sleep(rng.uniform(0.0, 0.2))
            kind, seconds = rng.choice(FAULTS), rng.uniform(0.01, 0.5)
            host = rng.choice([self.pair.near_host, self.pair.far_host])
            end = rng.choice([self.pair.near, self.pair.far])
            if kind == "partition":
                network.partition("near", "far")
            elif kind == "one way":
                network.partition("near", "far", one_way=True)
            elif kind == "other way":
                network.partition("far", "near", one_way=True)
            elif kind == "freeze":
                host.freeze()
            elif kind == "delay":
                network.delay("near", "far", seconds)
            elif kind == "pause":
                end.stream.pause_reading()
            else:
                host.slow(10)
            await asyncio.sleep(seconds)
            for a, b in (("near", "far"), ("far", "near")):
                network.heal(a, b, one_way=True)
            host.thaw()
            host.slow(1)
            network.delay("near", "far", 0.0)
            end.stream.resume_reading()

    def finish(self, ending: str) -> None:
        if ending == "close":
            self.pair.near_host.post(self.pair.near.stream.close)
        elif ending == "abort":
            self.pair.near_host.post(self.pair.near.stream.abort)
        elif ending == "reset":
            self.world.network.reset("near", "far")
        elif ending in ("kill", "power"):
            self.pair.far_host.crash(silent=ending == "power")

    def check(self, ending: str) -> None:
        near, far = self.pair.near, self.pair.far
        for name, reader in (("near", far), ("far", near)):
            assert self.sent[name].startswith(reader.data), "a prefix of what was written"
        for end in (near, far):
            told = [what for what in end.told if what in ("pause", "resume")]
            assert told[::2] == ["pause"] * len(told[::2])
            assert told[1::2] == ["resume"] * len(told[1::2])
            assert end.told[0] == "made"
            assert "lost" not in end.told or end.told.index("lost") == len(end.told) - 1, "nothing after the end"
        if ending == "none":
            assert (len(far.data), len(near.data)) == (len(self.sent["near"]), len(self.sent["far"]))
            assert near.stream.get_write_buffer_size() == far.stream.get_write_buffer_size() == 0
        if ending == "close":
            assert len(far.data) == len(self.sent["near"]) or near.error is not None
        if ending in ("close", "abort", "reset"):
            assert near.told[-1] == far.told[-1] == "lost"
        if ending == "kill":
            assert near.told[-1] == "lost"
            assert "lost" not in far.told


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_bytes_are_a_prefix_and_ends_are_told_once(seed: int) -> None:
    rng = random.Random(seed)
    settings = NetworkSettings(window=rng.choice([5_000, 65_536, 262_144]), bandwidth=rng.choice([1e6, 1e9]))
    with universe(seed, settings, max_callbacks=100_000) as world:
        chatter = Chatter(world, rng)
        trouble = world.spawn(chatter.trouble(), "trouble")
        ending = rng.choice(ENDINGS)
        passes(world, rng.uniform(0.0, 2.0))
        chatter.finish(ending)
        assert world.run(trouble.done, 60.0)
        passes(world, 60.0)
        chatter.check(ending)
        assert world.loop.failures == []
