"""The in-process backend, and what it can be told to do to the rooms above."""

import asyncio

from holdfast.base.ids import Epoch, InstanceId
from holdfast.runtime.discovery.contract import InstanceRecord
from holdfast.runtime.discovery.mem import MemDiscovery, MemHub


def a_record(instance="a", epoch=1, **fields):
    return InstanceRecord("dynamo", "backend", ("generate",), InstanceId(instance), Epoch(epoch), "h:1", **fields)


async def pair():
    hub = MemHub(ttl=0.05)
    owner, watcher, seen = MemDiscovery(hub), MemDiscovery(hub), []
    await owner.start()
    await watcher.start()
    watcher.subscribe(
        lambda e: seen.append((e.kind, e.record.instance if e.record else None, e.purposeful)),
    )
    return hub, owner, watcher, seen


async def until(condition):
    async with asyncio.timeout(2):
        while not condition():  # noqa: ASYNC110  there is no event to wait for
            await asyncio.sleep(0.01)


async def step():
    for _ in range(3):
        await asyncio.sleep(0)


async def test_publish_change_withdraw():
    _, owner, watcher, seen = await pair()
    await owner.publish(a_record())
    await step()
    await owner.publish(a_record(state="draining"))
    await step()
    assert watcher.snapshot() == [a_record(state="draining")]
    await owner.withdraw(InstanceId("a"))
    await step()
    assert seen == [("added", "a", False), ("changed", "a", False), ("removed", "a", True)]


async def test_close_withdraws_on_purpose_and_a_crash_does_not():
    _, owner, _, seen = await pair()
    await owner.publish(a_record())
    await step()
    await owner.close()
    await step()
    assert seen[-1] == ("removed", "a", True)
    _, owner, watcher, seen = await pair()
    await owner.publish(a_record())
    await step()
    owner.abandon()
    await step()
    assert watcher.snapshot() != []
    await until(lambda: not watcher.snapshot())
    assert seen[-1] == ("removed", "a", False)


async def test_a_cut_keeps_the_view_and_what_changed_arrives_afterwards():
    hub, owner, watcher, seen = await pair()
    await owner.publish(a_record())
    await step()
    hub.set_reachable(False)
    await step()
    await owner.publish(a_record(state="draining"))
    await owner.publish(a_record("b"))
    await step()
    assert not watcher.reachable
    assert watcher.snapshot() == [a_record()]
    hub.set_reachable(True)
    await step()
    assert seen[1:] == [
        ("unknown", None, False),
        ("known", None, False),
        ("changed", "a", False),
        ("added", "b", False),
    ]


async def test_a_lost_entry_is_created_again():
    hub, owner, watcher, seen = await pair()
    await owner.publish(a_record())
    await step()
    hub.lose(InstanceId("a"))
    await step()
    assert seen[-1] == ("removed", "a", False)
    await until(watcher.snapshot)


async def test_a_predecessor_does_not_withdraw_its_successor():
    _, owner, watcher, _ = await pair()
    await owner.publish(a_record(epoch=1))
    await watcher.publish(a_record(epoch=2))
    await owner.withdraw(InstanceId("a"))
    await step()
    assert watcher.snapshot() == [a_record(epoch=2)]
