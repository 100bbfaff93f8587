"""Leases, tombstones, dead processes and mass removals on a clock and a directory that the test makes up."""

from holdfast.base.ids import Epoch, InstanceId
from holdfast.runtime.discovery.contract import InstanceRecord
from holdfast.runtime.discovery.judge import Envelope, JudgeSettings, Listing, Stamp, StoreJudge
from holdfast.runtime.discovery.process import ProcessMark


class Store:
    """A directory in memory."""

    def __init__(self, settings: JudgeSettings | None = None):
        self.files: dict[str, tuple[Stamp, Envelope | None]] = {}
        self.gone: dict[str, Stamp] = {}
        self.temporary: dict[str, Stamp] = {}
        self.dead: set[int] = set()
        self.now = 100.0
        self.inode = 1
        self.away = False
        self.judge = StoreJudge(settings or JudgeSettings(), self._read, lambda mark: mark.pid in self.dead)

    def _read(self, name, stamp):
        return self.files[name][1]

    def put(self, name, pid=1, epoch=1, **fields):
        record = InstanceRecord(
            "dynamo", "backend", ("generate",), InstanceId(name), Epoch(epoch), "h:1", pid, **fields
        )
        self.inode += 1
        self.files[name] = (Stamp(self.inode, 0, 10), Envelope(record, ProcessMark("here", pid, 1)))
        self.gone.pop(name, None)

    def touch(self, *names):
        for name in names:
            stamp, envelope = self.files[name]
            self.files[name] = (stamp._replace(mtime_ns=stamp.mtime_ns + 1), envelope)

    def bury(self, name):
        self.gone[name] = self.files.pop(name)[0]

    def look(self, step=0.5, touch=()):
        self.now += step
        self.touch(*touch)
        listing = Listing({k: v[0] for k, v in self.files.items()}, dict(self.gone), dict(self.temporary))
        return self.judge.look(self.now, None if self.away else listing)

    def events(self, seconds=0.5, touch=(), step=0.5):
        found = []
        for _ in range(round(seconds / step)):
            found += self.look(step, touch).events
        return [(e.kind, e.record.instance if e.record else None, e.purposeful) for e in found]


def test_added_changed_withdrawn():
    store = Store()
    store.put("a")
    assert store.events() == [("known", None, False), ("added", "a", False)]
    store.put("a", state="draining")
    assert store.events() == [("changed", "a", False)]
    assert store.events(5, touch=("a",)) == []
    store.bury("a")
    assert store.events() == [("removed", "a", True)]


def test_a_withdrawal_of_a_version_never_seen_is_still_purposeful():
    store = Store()
    store.put("a")
    store.look()
    store.put("a", state="draining")
    store.bury("a")
    assert store.events() == [("removed", "a", True)]


def test_an_old_tombstone_does_not_make_a_later_loss_purposeful():
    store = Store()
    store.put("a")
    store.look()
    store.bury("a")
    tombstone = store.gone["a"]
    store.look()
    store.put("a", epoch=2)
    store.gone["a"] = tombstone
    assert store.events() == [("added", "a", False)]
    del store.files["a"]
    assert store.events(2.5) == [("removed", "a", False)]


def test_a_lease_ends_after_the_ttl_and_the_file_is_swept_once():
    store = Store()
    store.put("a")
    store.look()
    assert store.events(10) == []
    stamp = store.files["a"][0]
    sweeps = []
    kinds = []
    for _ in range(10):
        verdict = store.look()
        sweeps += verdict.sweep
        kinds += [e.kind for e in verdict.events]
    assert kinds == ["removed"]
    assert sweeps == [("record", "a", stamp)]


def test_a_renewal_after_the_ttl_but_before_the_removal_saves_the_record():
    store = Store()
    store.put("a")
    store.look()
    assert store.events(11) == []
    assert store.events(5, touch=("a",)) == []


def test_a_reader_that_was_frozen_expires_nobody():
    store = Store()
    store.put("a")
    store.look()
    assert store.events(60, step=60) == []
    assert store.events(8.5) == []
    assert store.events(5, touch=("a",)) == []


def test_a_dead_process_is_removed_at_the_next_look_even_without_the_directory():
    store = Store()
    store.put("a", pid=7)
    store.put("b", pid=8)
    store.look()
    store.dead.add(7)
    verdict = store.look()
    assert [(e.kind, e.record.instance, e.purposeful) for e in verdict.events] == [("removed", "a", False)]
    assert verdict.sweep == [("record", "a", store.files["a"][0])]
    store.away = True
    store.dead.add(8)
    assert store.events() == [("unknown", None, False), ("removed", "b", False)]


def test_a_record_of_a_dead_process_is_never_added():
    store = Store()
    store.dead.add(7)
    store.put("a", pid=7)
    verdict = store.look()
    assert [e.kind for e in verdict.events] == ["known"]
    assert [s[1] for s in verdict.sweep] == ["a"]


def test_a_vanished_entry_that_is_created_again_in_time_is_no_event():
    store = Store()
    store.put("a")
    store.look()
    del store.files["a"]
    assert store.events(1.0) == []
    store.put("a")
    assert store.events(3, touch=("a",)) == []


def test_mass_removal_is_unknown_for_a_bounded_time():
    store = Store()
    for name in "abcd":
        store.put(name)
    store.look()
    for name in "abc":
        del store.files[name]
    assert store.events() == [("unknown", n, False) for n in "abc"]
    store.put("b")
    assert store.events() == [("known", "b", False)]
    assert store.events(28, touch=("b", "d")) == []
    assert store.events(3, touch=("b", "d")) == [("removed", "a", False), ("removed", "c", False)]


def test_mass_expiry_sweeps_nothing_while_in_doubt():
    store = Store()
    for name in "abc":
        store.put(name)
    store.look()
    sweeps = []
    for _ in range(60):
        sweeps += store.look().sweep
    assert sweeps == []
    assert store.events(20, touch=()) == [("removed", n, False) for n in "abc"]


def test_mass_withdrawal_is_believed():
    store = Store()
    for name in "abc":
        store.put(name)
    store.look()
    for name in "abc":
        store.bury(name)
    assert store.events() == [("removed", n, True) for n in "abc"]


def test_an_unreadable_directory_keeps_the_view_and_forgives_when_it_is_back():
    store = Store()
    store.put("a")
    store.put("b")
    store.look()
    store.away = True
    assert store.events(60) == [("unknown", None, False)]
    store.away = False
    files, store.files = store.files, {}
    assert store.events() == [("known", None, False), ("unknown", "a", False), ("unknown", "b", False)]
    store.files["a"] = files["a"]
    assert store.events(1) == [("known", "a", False)]
    assert ("removed", "b", False) in store.events(31, touch=("a",))


def test_litter_is_swept_after_the_ttl():
    store = Store()
    store.gone["x"] = Stamp(5, 0, 1)
    store.temporary[".tmp_1"] = Stamp(6, 0, 1)
    for _ in range(20):
        assert store.look().sweep == []
    assert {s[:2] for s in store.look().sweep} == {("tombstone", "x"), ("temporary", ".tmp_1")}
