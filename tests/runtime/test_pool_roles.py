"""Workers that compute prompts only: never used for streams, told apart, and told why when nobody fits them."""

from __future__ import annotations

from tests.runtime.test_pool import Fleet, a_card, virtual

PREFILL = {"role": "prefill", "handoff": "nixl"}
DECODE = {"role": "decode", "handoff": "nixl"}


@virtual
async def test_prefill_workers_serve_no_streams():
    async with Fleet() as fleet:
        await fleet.add("p", cards=(a_card(**PREFILL),))
        await fleet.until(lambda: [w.instance for w in fleet.pool.prefill("m")] == ["p"])
        assert fleet.usable() == []
        assert fleet.pool.models() == {}, "a model that nobody decodes is not served"
        await fleet.add("d", cards=(a_card(**DECODE),))
        await fleet.until(lambda: fleet.usable() == ["d"])
        assert [w.instance for w in fleet.pool.prefill("m")] == ["p"]
        assert fleet.pool.has_prefill("m")
        assert {w.instance: w.role for w in fleet.pool.all_workers()} == {"p": "prefill", "d": "decode"}
        assert not any(w.trouble for w in fleet.pool.all_workers())


@virtual
async def test_a_fleet_without_them_has_none():
    async with Fleet() as fleet:
        await fleet.add("a")
        await fleet.until(lambda: fleet.usable() == ["a"])
        assert (fleet.pool.has_prefill("m"), fleet.pool.prefill("m")) == (False, [])


@virtual
async def test_a_prefill_worker_that_fits_nobody_says_why():
    async with Fleet() as fleet:
        await fleet.add("p", cards=(a_card(**PREFILL),))
        await fleet.add("d", cards=(a_card(role="decode", handoff="sglang"),))
        await fleet.until(lambda: fleet.usable() == ["d"])
        worker = fleet.pool.worker("p")
        assert "its handoff (nixl) is not that of decode worker d (sglang)" in worker.trouble
        assert worker.refused_for == "handoff"
        await fleet.add("e", cards=(a_card(**DECODE),))
        await fleet.until(lambda: len(fleet.usable()) == 2)
        assert fleet.pool.worker("p").trouble == "", "one that fits is enough"


@virtual
async def test_a_prefill_worker_never_speaks_for_a_model_that_somebody_serves():
    async with Fleet() as fleet:
        await fleet.add("p", cards=(a_card(**PREFILL, block_size=64),))
        await fleet.until(lambda: len(fleet.pool.prefill("m")) == 1)
        await fleet.add("d", cards=(a_card(**DECODE),))
        await fleet.until(lambda: fleet.usable() == ["d"])
        assert fleet.pool.prefill("m") == []
        assert fleet.pool.worker("p").refused_for == "block_size"
        assert fleet.pool.worker("d").trouble == ""


@virtual
async def test_the_departure_of_a_prefill_worker_says_nothing_about_the_model():
    async with Fleet() as fleet:
        await fleet.add("p", cards=(a_card(**PREFILL),))
        host = await fleet.add("d", cards=(a_card(**DECODE),))
        await fleet.until(lambda: fleet.usable() == ["d"])
        await fleet.owner.withdraw("p")
        await fleet.until(lambda: not fleet.pool.has_prefill("m"))
        host.crash()
        assert fleet.pool.replacement_expected("m")


@virtual
async def test_decode_workers_that_compute_no_prompts_are_known_by_their_cards():
    async with Fleet() as fleet:
        await fleet.add("p", cards=(a_card(**PREFILL, local_prefill=False),))
        await fleet.add("d", cards=(a_card(**DECODE),))
        await fleet.until(lambda: fleet.usable() == ["d"])
        assert not fleet.pool.needs_prefill("m")
        await fleet.add("e", cards=(a_card(**DECODE, local_prefill=False),))
        await fleet.until(lambda: len(fleet.usable()) == 2)
        assert fleet.pool.needs_prefill("m")
        assert [w.instance for w in fleet.pool.prefill_workers("m")] == ["p"]
        await fleet.owner.withdraw("e")
        await fleet.until(lambda: not fleet.pool.needs_prefill("m"))
