"""The network: order is sacred, chunks are not; partitions hold, resets break, windows fill."""

from __future__ import annotations

import asyncio
import random

import pytest

from holdfast.base.errors import CannotConnect
from holdfast.runtime.transport import CannotListen
from holdfast.sim.links import NetworkSettings
from tests.sim.worlds import Pair, Recorder, done, passes, universe

STEADY = NetworkSettings(fastest=1e-3, slowest=1.0000001e-3, jitter=0.0)


@pytest.mark.parametrize("seed", range(10))
def test_bytes_arrive_complete_and_in_order_whatever_their_pieces(seed: int) -> None:
    rng = random.Random(seed)
    with universe(seed) as world:
        near, far = world.boot("near"), world.boot("far")
        pairs = [Pair(world, near, far, 9000 + number).connect() for number in range(4)]
        sent = [bytearray() for _ in pairs]

        async def talk(pair: Pair, record: bytearray) -> None:
            for _ in range(80):
                data = rng.randbytes(rng.choice([1, 10, 1000, 50_000]))
                record += data
                pair.near.stream.write(data)
                await asyncio.sleep(rng.choice([0.0, 0.0001, 0.01]))
            pair.near.stream.close()

        for pair, record in zip(pairs, sent, strict=True):
            near.spawn(talk(pair, record), "talk")
        world.run()
        for pair, record in zip(pairs, sent, strict=True):
            assert pair.far.data == record
            assert pair.far.told == ["made", "eof", "lost"]
            assert pair.near.told[-1] == "lost"
        assert sum(pair.far.pieces for pair in pairs) != 4 * 80


def test_what_is_written_is_split_and_merged_at_random() -> None:
    pieces = set()
    for seed in range(10):
        with universe(seed) as world:
            pair = Pair(world).connect()

            async def talk(pair: Pair = pair) -> None:
                for _ in range(50):
                    pair.near.stream.write(b"0123456789")
                    await asyncio.sleep(0.0001)

            done(world, pair.near_host.spawn(talk(), "talk"))
            world.run()
            pieces.add(pair.far.pieces)
            assert len(pair.far.data) == 500
    assert len(pieces) > 5


def test_latency_and_bandwidth_take_their_time() -> None:
    settings = NetworkSettings(fastest=1e-3, slowest=1.0000001e-3, jitter=0.0, bandwidth=1e6, window=4_000_000)
    with universe(1, settings) as world:
        pair = Pair(world).connect()
        begun = world.now()
        pair.near.stream.write(bytes(500_000))
        world.run(lambda: len(pair.far.data) == 500_000, 10.0)
        assert 0.501 <= world.now() - begun <= 0.502


def test_connections_between_two_machines_share_the_bandwidth() -> None:
    settings = NetworkSettings(jitter=0.0, bandwidth=1e6, window=4_000_000)
    with universe(1, settings) as world:
        first = Pair(world).connect()
        second = Pair(world, first.near_host, first.far_host, 9001).connect()
        begun = world.now()
        for pair in (first, second):
            pair.near.stream.write(bytes(250_000))
        world.run(lambda: len(first.far.data) == len(second.far.data) == 250_000, 10.0)
        assert 0.5 <= world.now() - begun <= 0.51


def test_a_reader_that_is_frozen_fills_the_window_and_then_the_writer_has_to_pause() -> None:
    with universe(1, STEADY) as world:
        pair = Pair(world).connect()
        settings = world.network.settings
        pair.far_host.freeze()
        stream, sent = pair.near.stream, 0
        while "pause" not in pair.near.told:
            stream.write(bytes(10_000))
            sent += 10_000
            passes(world, 0.01)
        assert settings.window + settings.high_water < sent < settings.window + settings.high_water + 20_000
        assert stream.get_write_buffer_size() == sent - settings.window
        passes(world, 10.0)
        assert "resume" not in pair.near.told
        pair.far_host.thaw()
        world.run()
        assert pair.near.told == ["made", "pause", "resume"]
        assert len(pair.far.data) == sent
        assert stream.get_write_buffer_size() == 0


def test_pausing_is_told_from_within_write() -> None:
    """As asyncio does; the runtime's uploads rely on it."""
    with universe() as world:
        pair = Pair(world).connect()
        pair.near.stream.write(bytes(1_000_000))
        assert pair.near.told[-1] == "pause"


def test_a_reader_can_pause() -> None:
    with universe() as world:
        pair = Pair(world).connect()
        pair.far.stream.pause_reading()
        pair.near.stream.write(b"x" * 100)
        passes(world, 1.0)
        assert pair.far.data == b""
        pair.far.stream.resume_reading()
        world.run()
        assert pair.far.data == b"x" * 100


def test_a_partition_holds_bytes_until_it_heals_and_they_come_in_order() -> None:
    with universe() as world:
        pair = Pair(world).connect()
        pair.near.stream.write(b"before ")
        passes(world, 0.5)
        world.network.partition("near", "far")
        for word in (b"one ", b"two ", b"three "):
            pair.near.stream.write(word)
            pair.far.stream.write(word.upper())
            passes(world, 1.0)
        assert pair.far.data == b"before "
        assert pair.near.data == b""
        world.network.heal("near", "far")
        passes(world, 1.0)
        assert pair.far.data == b"before one two three "
        assert pair.near.data == b"ONE TWO THREE "


def test_a_one_way_partition_holds_one_direction_only() -> None:
    with universe() as world:
        pair = Pair(world).connect()
        world.network.partition("far", "near", one_way=True)
        pair.near.stream.write(b"goes")
        pair.far.stream.write(b"held")
        passes(world, 5.0)
        assert pair.far.data == b"goes"
        assert pair.near.data == b""
        world.network.heal("far", "near", one_way=True)
        passes(world, 1.0)
        assert pair.near.data == b"held"


def test_without_a_way_back_the_window_fills_although_the_reader_reads() -> None:
    with universe() as world:
        pair = Pair(world).connect()
        window = world.network.settings.window
        world.network.partition("far", "near", one_way=True)
        pair.near.stream.write(bytes(window + 50_000))
        passes(world, 5.0)
        assert len(pair.far.data) == window
        world.network.heal("far", "near", one_way=True)
        passes(world, 5.0)
        assert len(pair.far.data) == window + 50_000


def test_bytes_on_the_way_when_a_partition_begins_are_held_and_those_in_the_readers_system_are_not() -> None:
    with universe(1, STEADY) as world:
        pair = Pair(world).connect()
        pair.far_host.freeze()
        pair.near.stream.write(b"there ")
        passes(world, 0.1)
        pair.near.stream.write(b"not yet")
        world.network.partition("near", "far")
        pair.far_host.thaw()
        passes(world, 5.0)
        assert pair.far.data == b"there "
        world.network.heal("near", "far")
        passes(world, 1.0)
        assert pair.far.data == b"there not yet"


def test_partitions_that_overlap_end_when_the_last_one_does() -> None:
    with universe() as world:
        pair = Pair(world).connect()
        world.network.partition("near", "far")
        world.network.partition("near", "far", one_way=True)
        pair.near.stream.write(b"x")
        world.network.heal("near", "far")
        passes(world, 2.0)
        assert pair.far.data == b""
        world.network.heal("near", "far", one_way=True)
        passes(world, 2.0)
        assert pair.far.data == b"x"


def test_a_reset_tells_both_and_loses_what_was_on_the_way() -> None:
    with universe(1, STEADY) as world:
        pair = Pair(world).connect()
        pair.near.stream.write(b"lost")
        assert world.network.connections("near", "far") == 1
        assert world.network.reset("near", "far") == 1
        world.run()
        for side in (pair.near, pair.far):
            assert side.told == ["made", "lost"]
            assert isinstance(side.error, ConnectionResetError)
        assert pair.far.data == b""
        assert world.network.connections("near", "far") == 0
        pair.near.stream.write(b"into the void")
        world.run()


def test_a_delay_makes_everything_later_and_ends() -> None:
    with universe(1, STEADY) as world:
        pair = Pair(world).connect()
        world.network.delay("near", "far", 0.5)
        begun = world.now()
        pair.near.stream.write(b"x")
        world.run(lambda: bool(pair.far.data), 10.0)
        assert 0.5 <= world.now() - begun < 0.51
        world.network.delay("near", "far", 0.0)
        begun = world.now()
        pair.near.stream.write(b"y")
        world.run(lambda: len(pair.far.data) == 2, 10.0)
        assert world.now() - begun < 0.01


def test_close_sends_what_was_written_first() -> None:
    with universe() as world:
        pair = Pair(world).connect()
        pair.near.stream.write(bytes(900_000))
        pair.near.stream.close()
        pair.near.stream.write(b"too late")
        assert pair.near.stream.is_closing()
        world.run()
        assert len(pair.far.data) == 900_000
        assert pair.far.told == ["made", "eof", "lost"]
        assert pair.near.told == ["made", "pause", "resume", "lost"]


def test_abort_forgets_what_the_system_has_not_taken() -> None:
    with universe() as world:
        pair = Pair(world).connect()
        pair.near.stream.write(bytes(900_000))
        pair.near.stream.abort()
        world.run()
        assert len(pair.far.data) == world.network.settings.window
        assert pair.far.told == ["made", "eof", "lost"]


def test_whoever_closes_without_reading_resets_the_writer() -> None:
    with universe() as world:
        pair = Pair(world).connect()
        pair.far.stream.pause_reading()
        pair.near.stream.write(b"unread")
        passes(world, 1.0)
        pair.far.stream.close()
        world.run()
        assert isinstance(pair.near.error, ConnectionResetError)


def test_a_writer_that_waits_for_room_learns_that_its_peer_has_closed() -> None:
    with universe() as world:
        pair = Pair(world).connect()
        pair.far.stream.pause_reading()
        pair.near.stream.write(bytes(1_000_000))
        pair.near.stream.close()
        passes(world, 1.0)
        assert pair.near.told[-1] == "pause"
        pair.far.stream.abort()
        world.run()
        assert pair.near.told[-1] == "lost"


def test_lost_is_never_told_from_inside_close() -> None:
    with universe() as world:
        pair = Pair(world).connect()
        pair.near.stream.close()
        assert pair.near.told == ["made"]
        world.run()
        assert pair.near.told == ["made", "lost"]


def test_a_killed_process_breaks_its_connections_after_what_its_system_had() -> None:
    endings = set()
    for seed in range(12):
        with universe(seed) as world:
            pair = Pair(world).connect()
            pair.far.stream.write(b"last words")
            pair.far_host.crash()
            world.run()
            assert pair.near.data == b"last words"
            assert pair.near.told[-1] == "lost"
            assert pair.far.told == ["made"], "the dead are told nothing"
            endings.add(type(pair.near.error))
    assert endings == {type(None), ConnectionResetError}


def test_a_machine_without_power_says_nothing_until_it_is_back() -> None:
    with universe() as world:
        pair = Pair(world).connect()
        pair.far_host.crash(silent=True)
        pair.near.stream.write(b"anybody there?")
        passes(world, 60.0)
        assert pair.near.told == ["made"]
        world.boot("far")
        passes(world, 2.0)
        assert isinstance(pair.near.error, ConnectionResetError)


def test_an_idle_connection_to_a_restarted_machine_breaks_when_it_is_used() -> None:
    with universe() as world:
        pair = Pair(world).connect()
        pair.far_host.crash(silent=True)
        passes(world, 1.0)
        world.boot("far")
        passes(world, 30.0)
        assert pair.near.told == ["made"]
        pair.near.stream.write(b"x")
        passes(world, 1.0)
        assert isinstance(pair.near.error, ConnectionResetError)


async def connects(pair: Pair, patience: float = 3.0) -> str:
    try:
        await pair.dial(patience)
    except CannotConnect as error:
        return error.message
    return "connected"


def test_connecting_to_nobody_is_refused() -> None:
    with universe() as world:
        pair = Pair(world)
        told = done(world, pair.near_host.spawn(connects(pair), "dial"))
        assert "Connect call failed" in told
        assert world.now() < 0.1


def test_connecting_to_a_killed_process_is_refused_and_to_its_successor_not() -> None:
    with universe() as world:
        pair = Pair(world).connect()
        pair.far_host.crash()
        assert "failed" in done(world, pair.near_host.spawn(connects(pair), "dial"))
        pair.far_host = world.boot("far")
        done(world, pair.far_host.spawn(pair.listen(), "listen"))
        assert done(world, pair.near_host.spawn(connects(pair), "dial")) == "connected"


@pytest.mark.parametrize("fault", ["silent", "partition", "one way", "other way", "never was"])
def test_connecting_into_nothing_takes_the_whole_timeout(fault: str) -> None:
    with universe() as world:
        pair = Pair(world)
        done(world, pair.far_host.spawn(pair.listen(), "listen"))
        if fault == "silent":
            pair.far_host.crash(silent=True)
        elif fault == "partition":
            world.network.partition("near", "far")
        elif fault == "one way":
            world.network.partition("near", "far", one_way=True)
        elif fault == "other way":
            world.network.partition("far", "near", one_way=True)
        else:
            pair.far_host.address = "10.9.9.9"
        told = done(world, pair.near_host.spawn(connects(pair), "dial"))
        assert told.startswith("no connection to ")
        assert world.now() == pytest.approx(3.0)


def test_connecting_goes_on_when_a_partition_heals_in_time() -> None:
    with universe() as world:
        pair = Pair(world)
        done(world, pair.far_host.spawn(pair.listen(), "listen"))
        world.network.partition("near", "far")
        task = pair.near_host.spawn(connects(pair), "dial")
        passes(world, 1.0)
        world.network.heal("near", "far")
        assert done(world, task) == "connected"
        assert 1.0 < world.now() < 3.0


def test_the_system_of_a_frozen_process_accepts_and_the_process_finds_it_later() -> None:
    with universe() as world:
        pair = Pair(world)
        done(world, pair.far_host.spawn(pair.listen(), "listen"))
        pair.far_host.freeze()
        assert done(world, pair.near_host.spawn(connects(pair), "dial")) == "connected"
        pair.near.stream.write(b"hello")
        passes(world, 5.0)
        assert pair.accepted == []
        pair.far_host.thaw()
        world.run()
        assert pair.far.data == b"hello"


def test_the_backlog_of_a_frozen_process_is_bounded() -> None:
    with universe(1, NetworkSettings(backlog=3)) as world:
        pair = Pair(world)
        done(world, pair.far_host.spawn(pair.listen(), "listen"))
        pair.far_host.freeze()
        tasks = [pair.near_host.spawn(connects(pair), "dial") for _ in range(5)]
        told = [done(world, task) for task in tasks]
        assert told.count("connected") == 3


def test_a_caller_that_gives_up_leaves_no_connection() -> None:
    with universe(1, STEADY) as world:
        pair = Pair(world)
        done(world, pair.far_host.spawn(pair.listen(), "listen"))
        task = pair.near_host.spawn(connects(pair), "dial")
        passes(world, 0.0015)
        task.cancel()
        world.run()
        assert pair.accepted == []
        assert world.network.connections("near", "far") == 0


def test_a_caller_frozen_while_connecting_finds_what_became_of_it() -> None:
    with universe(1, STEADY) as world:
        pair = Pair(world)
        done(world, pair.far_host.spawn(pair.listen(), "listen"))
        task = pair.near_host.spawn(connects(pair), "dial")
        passes(world, 0.0005)
        pair.near_host.freeze()
        passes(world, 1.0)
        assert len(pair.accepted) == 1, "the systems have shaken hands"
        pair.near_host.thaw()
        assert done(world, task) == "connected"
        pair.near.stream.write(b"late")
        world.run()
        assert pair.far.data == b"late"


def test_an_address_is_taken_once() -> None:
    async def twice(pair: Pair) -> None:
        await pair.listen()
        with pytest.raises(CannotListen, match="Address already in use"):
            await pair.listen()

    with universe() as world:
        pair = Pair(world)
        done(world, pair.far_host.spawn(twice(pair), "listen"))


def test_only_own_addresses_can_be_bound() -> None:
    async def bind(pair: Pair) -> None:
        transport = pair.world.network.transport(pair.far_host)
        with pytest.raises(CannotListen, match="Cannot assign requested address"):
            await transport.listen(pair.near_host.address, 1, lambda: Recorder(pair.world))

    with universe() as world:
        pair = Pair(world)
        done(world, pair.far_host.spawn(bind(pair), "bind"))


def test_a_loopback_listener_is_for_its_own_machine_and_free_ports_differ() -> None:
    with universe() as world:
        near, far = world.boot("near"), world.boot("far")
        transport = world.network.transport(far)
        accepted: list[Recorder] = []

        def accept() -> Recorder:
            accepted.append(Recorder(world))
            return accepted[-1]

        async def listen() -> list[str]:
            return [(await transport.listen("127.0.0.1", 0, accept)).address for _ in range(3)]

        addresses = done(world, far.spawn(listen(), "listen"))
        assert len(set(addresses)) == 3

        async def dial(host: object) -> None:
            own = world.network.transport(far if host is far else near)
            await own.connect(addresses[0], lambda: Recorder(world), 2.0)

        done(world, far.spawn(dial(far), "own"))
        with pytest.raises(CannotConnect, match="failed"):
            done(world, near.spawn(dial(near), "other"))
        world.run()
        assert len(accepted) == 1


def test_a_closed_listener_accepts_nobody_and_keeps_its_connections() -> None:
    with universe() as world:
        pair = Pair(world)

        async def listen() -> None:
            transport = world.network.transport(pair.far_host)
            listener = await transport.listen(pair.far_host.address, 9000, pair._accept)
            await asyncio.sleep(1.0)
            await listener.close()
            await listener.close()

        pair.far_host.spawn(listen(), "listen")
        passes(world, 0.5)
        assert done(world, pair.near_host.spawn(connects(pair), "dial")) == "connected"
        passes(world, 1.0)
        pair.near.stream.write(b"still here")
        passes(world, 0.1)
        assert pair.far.data == b"still here"
        other = Pair(world, pair.near_host, pair.far_host)
        assert "failed" in done(world, pair.near_host.spawn(connects(other), "dial"))


def test_protocols_can_ask_who_is_there() -> None:
    with universe() as world:
        pair = Pair(world).connect()
        near, far = pair.near.stream, pair.far.stream
        assert near.get_extra_info("peername") == (pair.far_host.address, 9000)
        assert near.get_extra_info("sockname") == far.get_extra_info("peername")
        assert near.get_extra_info("socket", "none") == "none"


def test_one_universe_one_network_life() -> None:
    def life(seed: int) -> tuple[list[tuple[float, str]], bytes, str]:
        with universe(seed) as world:
            pair = Pair(world).connect()

            async def talk() -> None:
                for number in range(100):
                    pair.near.stream.write(bytes([number]) * (number + 1))
                    await asyncio.sleep(0.001)

            pair.near_host.spawn(talk(), "talk")
            passes(world, 0.03)
            world.network.partition("near", "far")
            passes(world, 0.05)
            world.network.heal("near", "far")
            passes(world, 0.01)
            world.network.reset("near", "far")
            world.run()
            return pair.near.calls + pair.far.calls, bytes(pair.far.data), world.digest()

    assert life(3) == life(3)
    assert len({life(seed)[2] for seed in range(20)}) == 20
