"""A context only goes forward, and takes its children along."""

import asyncio
import gc

import pytest

from holdfast.runtime.context import Context, ContextState


async def test_states_only_go_forward() -> None:
    context = Context("r1")
    assert (context.id(), context.state, context.is_stopped(), context.is_killed()) == ("r1", "running", False, False)
    context.stop_generating()
    assert (context.is_stopped(), context.is_killed()) == (True, False)
    context.kill()
    context.stop()
    assert context.state == "killed"
    assert context.is_stopped()


@pytest.mark.parametrize("way", ["stop", "kill"])
async def test_waiting_ends(way: str) -> None:
    context = Context("r1")
    waiters = [asyncio.ensure_future(w) for w in (context.stopped(), context.async_killed_or_stopped())]
    await asyncio.sleep(0)
    assert not any(w.done() for w in waiters)
    getattr(context, way)()
    await asyncio.wait_for(asyncio.gather(*waiters), 1.0)


async def test_children_follow_and_parents_do_not() -> None:
    parent = Context("parent")
    child, linked = parent.child("child"), Context("linked")
    parent.link_child(linked)
    grandchild = linked.child()
    assert grandchild.id() == "linked"
    child.stop()
    assert not parent.is_stopped()
    assert not linked.is_stopped()
    parent.stop()
    assert [c.state for c in (linked, grandchild)] == ["stopped", "stopped"]
    parent.kill()
    assert [c.state for c in (child, linked, grandchild)] == ["killed"] * 3


async def test_a_child_linked_late_follows_at_once() -> None:
    parent = Context("parent")
    parent.kill()
    assert parent.child().is_killed()


async def test_finished_children_are_not_kept() -> None:
    parent = Context("parent")
    for _ in range(100):
        parent.child()
    gc.collect()
    assert parent._children == {}


async def test_watchers_are_told_each_step_and_contained() -> None:
    context, seen = Context("r1"), list[ContextState]()

    def broken(_: ContextState) -> None:
        raise RuntimeError

    context.watch(broken)
    unwatch = context.watch(seen.append)
    context.stop()
    context.kill()
    assert seen == ["stopped", "killed"]
    unwatch()
    late = list[ContextState]()
    context.watch(late.append)
    assert late == ["killed"]
