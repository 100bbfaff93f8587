"""Whether somebody who left will be replaced: adapters come back only if whoever loads them does."""

from holdfast.base.ids import Epoch, InstanceId
from holdfast.models.card import Artifact, ModelCard
from holdfast.runtime.departures import REMEMBERED_MODELS, Departures
from holdfast.runtime.discovery.contract import SUPERVISOR, InstanceRecord

FILE = Artifact("0" * 64, 1)
BASE = ModelCard("m", FILE, FILE, 10, (1,), 10, 4)


def adapter(name: str) -> ModelCard:
    return ModelCard(name, FILE, FILE, 10, (1,), 10, 4, base_model="m")


def record(*cards: ModelCard, instance: str = "a") -> InstanceRecord:
    return InstanceRecord("dynamo", "backend", (), InstanceId(instance), Epoch(1), "x:1", cards=cards)


def supervised() -> Departures:
    departures = Departures()
    boss = InstanceRecord("dynamo", SUPERVISOR, (), InstanceId("s"), Epoch(1), "", meta={"worker-0": "running"})
    departures.supervisor(boss)
    return departures


def test_taken_from_a_worker_that_stays():
    departures = supervised()
    departures.offers(record(BASE, adapter("shy")), (BASE,))
    assert departures.replacement_expected("shy")
    departures.offers(record(BASE), (BASE, adapter("shy")))
    assert not departures.replacement_expected("shy"), "no restart brings it"
    assert departures.replacement_expected("m")
    departures.offers(record(BASE, adapter("shy")), (BASE,))
    assert departures.replacement_expected("shy")


def test_lost_with_its_worker_until_the_next_start_shows_whether_it_has_it():
    departures = supervised()
    departures.left((BASE, adapter("static"), adapter("late")), purposeful=False, instance=InstanceId("a"))
    assert departures.replacement_expected("late"), "not known yet"
    departures.offers(record(BASE, instance="b"))
    assert departures.replacement_expected("late"), "that is another slot"
    departures.offers(record(BASE, adapter("static")))
    assert [departures.replacement_expected(name) for name in ("m", "static", "late")] == [True, True, False]


def test_the_latest_loss_counts():
    departures = supervised()
    departures.offers(record(BASE), (BASE, adapter("shy")))
    departures.left((BASE, adapter("shy")), purposeful=False, instance=InstanceId("b"))
    assert departures.replacement_expected("shy"), "that slot may bring it back"


def test_what_is_remembered_is_bounded():
    departures = Departures()
    for number in range(REMEMBERED_MODELS + 5):
        departures.left((adapter("x"),), purposeful=False, instance=InstanceId(str(number)))
    assert len(departures._had) == REMEMBERED_MODELS
