"""The file backend with real processes, signals and a real directory."""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import stat
import sys
import time
from pathlib import Path

import pytest

from holdfast.base.errors import InvalidRequest, PayloadTooLarge
from holdfast.base.ids import Epoch, InstanceId
from holdfast.runtime.discovery.contract import DiscoveryEvent, InstanceRecord
from holdfast.runtime.discovery.factory import open_discovery
from holdfast.runtime.discovery.file import FileDiscovery, FileSettings
from holdfast.runtime.discovery.judge import JudgeSettings
from tests.patience import within

PARTICIPANT = Path(__file__).with_name("participant.py")
TTL = 2.0


def a_record(instance="me", epoch=1, **fields):
    return InstanceRecord(
        "dynamo", "backend", ("generate",), InstanceId(instance), Epoch(epoch), "127.0.0.1:1", os.getpid(), **fields
    )


async def until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.005)


class Watcher:
    """A participant of this process that records events with the time they came."""

    def __init__(self, root: Path, ttl: float = TTL):
        self.discovery = FileDiscovery(root, FileSettings(JudgeSettings(ttl=ttl, settle=0.75)))
        self.events: list[tuple[float, DiscoveryEvent]] = []

    async def __aenter__(self):
        await self.discovery.start()
        self.discovery.subscribe(lambda event: self.events.append((time.monotonic(), event)))
        return self

    async def __aexit__(self, *_):
        await self.discovery.close()

    def kinds(self, instance=None):
        return [e.kind for _, e in self.events if (e.record.instance if e.record else None) == instance]

    def last(self, instance):
        return next(p for p in reversed(self.events) if p[1].record is not None and p[1].record.instance == instance)

    def sees(self, instance):
        return any(r.instance == instance for r in self.discovery.snapshot())


@contextlib.asynccontextmanager
async def participant(root, instance, epoch=1, ttl=TTL):
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(PARTICIPANT),
        str(root),
        instance,
        str(epoch),
        str(ttl),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert await asyncio.wait_for(process.stdout.readline(), 10) == b"up\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_publish_change_withdraw_are_seen_within_150_ms(tmp_path):
    root = tmp_path / "kv"
    async with Watcher(root) as one, Watcher(root) as two:
        start = time.monotonic()
        await one.discovery.publish(a_record())
        assert one.sees("me"), "publish returns when the own view shows it"
        await until(lambda: two.sees("me"))
        assert two.last("me")[0] - start < within(0.15)
        start = time.monotonic()
        await one.discovery.publish(a_record(state="draining"))
        await until(lambda: two.kinds("me") == ["added", "changed"])
        assert two.last("me")[0] - start < within(0.15)
        start = time.monotonic()
        await one.discovery.withdraw(InstanceId("me"))
        await until(lambda: not two.sees("me"))
        when, event = two.last("me")
        assert when - start < within(0.15)
        assert event.purposeful
        assert stat.S_IMODE(root.stat().st_mode) == 0o700


async def test_files_are_private_and_hold_a_whole_record(tmp_path):
    async with Watcher(tmp_path / "kv") as one:
        await one.discovery.publish(a_record("a/../b"))
        (file,) = (tmp_path / "kv").iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert one.sees("a/../b")


async def test_a_killed_process_is_gone_within_a_second(tmp_path):
    async with Watcher(tmp_path) as one, participant(tmp_path, "w") as process:
        await until(lambda: one.sees("w"))
        start = time.monotonic()
        process.kill()
        await until(lambda: not one.sees("w"))
        when, event = one.last("w")
        assert when - start < within(1.0)
        assert (event.kind, event.purposeful) == ("removed", False)
        await until(lambda: not list(tmp_path.glob("w.*")))


async def test_an_orderly_exit_is_told_apart(tmp_path):
    async with Watcher(tmp_path) as one, participant(tmp_path, "w") as process:
        await until(lambda: one.sees("w"))
        process.stdin.write(b"close\n")
        assert await asyncio.wait_for(process.wait(), 5) == 0
        await until(lambda: not one.sees("w"))
        assert one.last("w")[1].purposeful
        await until(lambda: not list(tmp_path.glob("w.*")), TTL + 3)


async def test_a_frozen_process_expires_and_is_back_soon_after_it_thaws(tmp_path):
    async with Watcher(tmp_path) as one, participant(tmp_path, "w") as process:
        await until(lambda: one.sees("w"))
        process.send_signal(signal.SIGSTOP)
        await until(lambda: not one.sees("w"), TTL + 3)
        assert one.last("w")[1].purposeful is False
        start = time.monotonic()
        process.send_signal(signal.SIGCONT)
        await until(lambda: one.sees("w"))
        assert time.monotonic() - start < within(1.5)


async def test_a_busy_loop_does_not_lose_its_lease(tmp_path):
    async with Watcher(tmp_path, ttl=1.0) as one, participant(tmp_path, "w", ttl=1.0) as process:
        await until(lambda: one.sees("w"))
        process.stdin.write(b"block\n")
        assert await asyncio.wait_for(process.stdout.readline(), 10) == b"blocked\n"
        assert one.kinds("w") == ["added"]


async def test_sigkill_in_the_middle_of_writing_leaves_a_consistent_store(tmp_path):
    async with Watcher(tmp_path) as one:
        for round_number in range(4):
            async with participant(tmp_path, "w", epoch=round_number) as process:
                process.stdin.write(b"100000\n")
                await until(lambda: one.sees("w") and one.last("w")[1].record.meta.get("number", 0) > 3)
                process.kill()
                await process.wait()
            await until(lambda: not one.sees("w"))
        await until(lambda: list(tmp_path.iterdir()) == [], TTL + 3)


async def test_a_successor_is_not_disturbed_by_its_thawed_predecessor(tmp_path):
    async with Watcher(tmp_path) as one, participant(tmp_path, "w", epoch=1) as old:
        await until(lambda: one.sees("w"))
        old.send_signal(signal.SIGSTOP)
        async with participant(tmp_path, "w", epoch=2):
            await until(lambda: one.last("w")[1].record.epoch == 2)
            old.send_signal(signal.SIGCONT)
            old.stdin.write(b"close\n")
            await asyncio.wait_for(old.wait(), 5)
            await asyncio.sleep(0.5)
            assert [r.epoch for r in one.discovery.snapshot()] == [2]
            assert "removed" not in one.kinds("w")


async def test_losing_the_directory_keeps_the_view_and_heals(tmp_path):
    root = tmp_path / "kv"
    async with Watcher(root) as one, participant(root, "w"):
        await until(lambda: one.sees("w"))
        shutil.rmtree(root)
        await until(lambda: not one.discovery.reachable)
        await until(lambda: one.discovery.reachable and (root / "w.json").exists(), 3)
        assert one.sees("w")
        assert "removed" not in one.kinds("w")
        assert stat.S_IMODE(root.stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
async def test_an_unreadable_directory_is_unknown(tmp_path):
    root = tmp_path / "kv"
    async with Watcher(root) as one:
        await one.discovery.publish(a_record())
        root.chmod(0)
        await until(lambda: not one.discovery.reachable)
        assert one.sees("me")
        root.chmod(0o700)
        await until(lambda: one.discovery.reachable)


async def test_a_path_that_is_no_directory_heals_when_it_becomes_one(tmp_path):
    root = tmp_path / "kv"
    async with Watcher(root) as one:
        await one.discovery.publish(a_record())
        shutil.rmtree(root)
        root.write_text("in the way")
        await until(lambda: not one.discovery.reachable)
        assert one.sees("me")
        root.unlink()
        await until(lambda: one.discovery.reachable, 3)
        await until((root / "me.json").exists, 3)
        assert one.sees("me")


async def test_garbage_is_skipped_and_said_once(tmp_path, caplog):
    (tmp_path / "bad.json").write_text("{not json")
    (tmp_path / "other.json").write_bytes((tmp_path / "bad.json").read_bytes())
    (tmp_path / "README").write_text("hello")
    async with Watcher(tmp_path) as one:
        await one.discovery.publish(a_record())
        await asyncio.sleep(1.2)
        assert [r.instance for r in one.discovery.snapshot()] == ["me"]
        assert sum("bad.json" in r.getMessage() for r in caplog.records) == 1
    assert (tmp_path / "README").exists()


async def test_a_failing_subscriber_does_not_hurt_the_others(tmp_path):
    async with Watcher(tmp_path) as one:
        one.discovery._sinks.insert(0, lambda event: 1 / 0)
        await one.discovery.publish(a_record())
        assert one.kinds("me") == ["added"]


async def test_an_oversize_record_is_refused_by_name(tmp_path):
    async with Watcher(tmp_path) as one:
        with pytest.raises(PayloadTooLarge, match="DISCOVERY_RECORD_BYTES"):
            await one.discovery.publish(a_record(meta={"x": "y" * 2_000_000}))


async def test_idle_cost_is_small(tmp_path):
    async with Watcher(tmp_path) as one:
        for number in range(8):
            await one.discovery.publish(a_record(f"w{number}"))
        cpu, wall = time.process_time(), time.monotonic()
        await asyncio.sleep(2.0)
        share = (time.process_time() - cpu) / (time.monotonic() - wall)
        print(f"idle: {share:.3%} of one core, watching and renewing 8 records")
        assert share < within(0.02)


def test_the_factory_says_what_it_can(tmp_path):
    with pytest.raises(InvalidRequest, match=r"etcd.*not in this version.*file, mem"):
        open_discovery("etcd")
    with pytest.raises(InvalidRequest, match="DYN_DISCOVERY_BACKEND"):
        open_discovery(environ={"DYN_DISCOVERY_BACKEND": "zookeeper"})
    with pytest.raises(InvalidRequest, match="DYN_FILE_KV_TTL"):
        open_discovery(environ={"DYN_FILE_KV_TTL": "soon"})
    opened = open_discovery(environ={"DYN_FILE_KV": str(tmp_path / "x"), "DYN_FILE_KV_TTL": "4"})
    assert isinstance(opened, FileDiscovery)
    assert opened._directory.root == tmp_path / "x"
    assert opened._settings.judge.ttl == 4
    assert open_discovery(f"file://{tmp_path}")._directory.root == tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
async def test_after_random_kills_freezes_and_restarts_every_view_is_the_truth(tmp_path, seed):
    rng = random.Random(seed)
    names = [f"w{n}" for n in range(5)]
    async with contextlib.AsyncExitStack() as stack:
        one = await stack.enter_async_context(Watcher(tmp_path))
        two = await stack.enter_async_context(Watcher(tmp_path))
        running = {}
        for step in range(25):
            name = rng.choice(names)
            if name not in running:
                running[name] = (await stack.enter_async_context(participant(tmp_path, name, epoch=step)), step)
                continue
            process, _ = running[name]
            deed = rng.choice(["kill", "close", "freeze", "churn", "lose"])
            if deed == "kill":
                process.kill()
                running.pop(name)
            elif deed == "close":
                process.stdin.write(b"close\n")
                running.pop(name)
            elif deed == "freeze":
                process.send_signal(signal.SIGSTOP)
                asyncio.get_running_loop().call_later(rng.uniform(0.1, 4), _thaw, process)
            elif deed == "churn":
                process.stdin.write(b"200\n")
            else:
                (tmp_path / f"{name}.json").unlink(missing_ok=True)
            await asyncio.sleep(rng.uniform(0, 0.5))

        def truth(watcher):
            return {r.instance: r.epoch for r in watcher.discovery.snapshot()} == {
                n: e for n, (_, e) in running.items()
            }

        await until(lambda: truth(one) and truth(two), 15)


def _thaw(process):
    if process.returncode is None:
        process.send_signal(signal.SIGCONT)
