"""Which requests a worker takes, and as what."""

import pytest

from holdfast.base.errors import ModelNotFound, WorkerDraining
from holdfast.engines.contract import GenerateRequest, Sampling, StopRules
from holdfast.worker.offer import REMEMBERED, Offer


def request(model, lora=None):
    return GenerateRequest("r", model, b"", Sampling(), StopRules(1), lora=lora)


def admit(offer, model, lora=None, *, canary=False):
    return offer.admit(request(model, lora), canary=canary).lora


def test_names_decide_the_adapter_whatever_the_caller_says():
    offer = Offer()
    assert admit(offer, "anything", "forged") is None
    offer.base({"base", "alias"})
    offer.add("shy")
    assert [admit(offer, name, "forged") for name in ("base", "alias", "shy")] == [None, None, "shy"]
    with pytest.raises(ModelNotFound, match=r"does not serve 'other' but alias, base, shy"):
        admit(offer, "other")


def test_callers_that_do_not_know_yet_are_sent_elsewhere():
    offer = Offer()
    offer.base({"base"})
    offer.add("shy")
    offer.remove("shy")
    with pytest.raises(WorkerDraining, match="unloaded from this worker"):
        admit(offer, "shy")
    offer.add("shy")
    assert admit(offer, "shy") == "shy"
    for number in range(REMEMBERED + 1):
        offer.remove(f"a{number}")
    with pytest.raises(ModelNotFound):
        admit(offer, "a0")


def test_closed_for_all_but_canaries():
    offer = Offer()
    offer.closed = "the engine sleeps"
    with pytest.raises(WorkerDraining, match="nothing at the moment: the engine sleeps"):
        admit(offer, "base")
    assert admit(offer, "base", canary=True) is None
