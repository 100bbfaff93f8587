"""Frozen, hung, slow: told apart on a clock that the test makes up."""

from holdfast.base.errors import PeerSilent, WorkerStalled
from holdfast.base.ids import InstanceId
from holdfast.runtime.detector import DetectorSettings, FailureDetector
from holdfast.wire.frames import Load, Pong, Progress


class FakeWorker:
    """Answers pings after ``delay`` seconds unless frozen; works at ``rate`` steps a second while busy."""

    def __init__(self, name):
        self.name = InstanceId(name)
        self.delay = 0.002
        self.frozen = False
        self.inbox = []
        self.busy = False
        self.rate = 100.0
        self.steps = 0.0
        self.fields = {"phase": "decode"}
        self.load = {"running": 1}

    def pong(self, sequence):
        in_flight = 1 if self.busy else 0
        fields = self.fields if self.busy else {"phase": "idle"}
        load = Load(**self.load) if self.busy else Load()
        return Pong(sequence, Progress(steps=int(self.steps), in_flight=in_flight, **fields), load)


class World:
    """A frontend with a detector and some workers, advanced in steps of 10 ms."""

    def __init__(self, count=1, settings=None, **add):
        self.now = 1000.0
        self.detector = FailureDetector(settings)
        self.workers = {InstanceId(n): FakeWorker(n) for n in "abcdefgh"[:count]}
        self.judgements = []
        self.sequence = 0
        self.next_check = 0.0
        for name in self.workers:
            self.detector.add(name, self.now, **add)

    def __getitem__(self, name):
        return self.workers[InstanceId(name)]

    def _note(self, judgement):
        if judgement is not None:
            self.judgements.append((round(self.now - 1000.0, 2), judgement.instance, judgement.state, judgement.error))

    def run(self, seconds):
        for _ in range(round(seconds * 100)):
            self.now += 0.01
            for worker in self.workers.values():
                if worker.busy and not worker.frozen:
                    worker.steps += worker.rate * 0.01
                while not worker.frozen and worker.inbox and self.now >= worker.inbox[0][1] + worker.delay:
                    sequence, _ = worker.inbox.pop(0)
                    self._note(self.detector.pong(worker.name, worker.pong(sequence), self.now))
            if self.now >= self.next_check:
                self.next_check = self.now + 0.1
                for judgement in self.detector.check(self.now):
                    self._note(judgement)
                for name in self.detector.due_pings(self.now):
                    self.sequence += 1
                    self.workers[name].inbox.append((self.sequence, self.now))
                    self.detector.pinged(name, self.sequence, self.now)

    def block(self, seconds):
        """Our own loop is stuck: nothing runs here, the workers go on."""
        for worker in self.workers.values():
            if worker.busy:
                worker.steps += worker.rate * seconds
        self.now += seconds

    def states(self):
        return [(who, state) for _, who, state, _ in self.judgements]


def test_a_healthy_worker_is_never_judged():
    world = World(3)
    world["a"].busy = True
    world.run(120)
    assert world.judgements == []


def test_a_frozen_worker_is_found_within_two_seconds_and_only_it():
    world = World(2)
    world.run(10)
    world["a"].frozen = True
    world.run(3)
    ((when, who, state, error),) = world.judgements
    assert (who, state) == ("a", "silent")
    assert 1.5 <= when - 10 < 2.0
    assert isinstance(error, PeerSilent)
    assert error.fault == "transport"


def test_it_is_hesitant_before_it_is_suspect():
    world = World(2)
    world.run(5)
    world["a"].frozen = True
    world.run(1.0)
    assert world.judgements == []
    assert world.detector.hesitant(InstanceId("a"), world.now)
    assert not world.detector.hesitant(InstanceId("b"), world.now)


def test_a_thawed_worker_is_back_within_two_seconds_however_long_it_slept():
    world = World(2)
    world.run(5)
    world["a"].frozen = True
    world.run(60)
    thawed = world.now - 1000
    world["a"].frozen = False
    world.run(3)
    assert world.states() == [("a", "silent"), ("a", "ok")]
    assert world.judgements[-1][0] - thawed < 2.0


def test_a_long_sleep_does_not_make_the_next_freeze_harder_to_see():
    world = World(2)
    world.run(5)
    world["a"].frozen = True
    world.run(20)
    world["a"].frozen = False
    world.run(10)
    world["a"].frozen = True
    start = world.now - 1000
    world.run(3)
    assert world.judgements[-1][2] == "silent"
    assert world.judgements[-1][0] - start < 2.0


def test_a_slow_worker_is_not_ejected():
    world = World(2)
    world["a"].delay = 1.2
    world.run(120)
    assert world.judgements == []


def test_a_worker_that_gets_slower_teaches_the_bound():
    world = World(2)
    for delay in (0.5, 0.9, 1.3, 1.7, 2.1):
        world["a"].delay = delay
        world.run(10)
    assert world.judgements == []
    assert world.detector.freeze_bound(InstanceId("a"), world.now) > 3.0
    world["a"].delay = 0.002
    world.run(300)
    assert world.detector.freeze_bound(InstanceId("a"), world.now) == 1.5


def test_the_bound_has_a_ceiling():
    world = World(2, DetectorSettings(freeze_ceiling=4.0))
    world["a"].delay = 1.4
    world.run(20)
    world["a"].delay = 2.6
    world.run(20)
    world["a"].frozen = True
    start = world.now - 1000
    world.run(6)
    assert world.judgements[-1][2] == "silent"
    assert world.judgements[-1][0] - start < 4.5


def test_a_late_loop_of_our_own_is_blamed_on_nobody():
    world = World(2)
    world.run(5)
    for _ in range(5):
        world.block(7.0)
        world.run(0.3)
    world.run(5)
    assert world.judgements == []
    assert world.detector.discarded == 5


def test_a_worker_that_freezes_while_we_were_late_is_found_afterwards():
    world = World(2)
    world.run(5)
    world["a"].frozen = True
    world.block(10)
    world.run(1.0)
    assert world.judgements == []
    world.run(1.5)
    assert world.states() == [("a", "silent")]


def test_most_of_them_silent_at_once_makes_us_doubt_ourselves_first():
    world = World(4)
    world.run(5)
    for name in "abc":
        world[name].frozen = True
    world.run(2.3)
    assert world.judgements == []
    for name in "abc":
        world[name].frozen = False
    world.run(5)
    assert world.judgements == []
    for name in "abc":
        world[name].frozen = True
    world.run(3.0)
    assert world.states() == [("a", "silent"), ("b", "silent"), ("c", "silent")]


def test_the_only_worker_left_is_judged_without_doubt():
    world = World(2)
    world.run(5)
    world["a"].frozen = True
    world.run(3)
    world["b"].frozen = True
    start = world.now - 1000
    world.run(3)
    assert world.states() == [("a", "silent"), ("b", "silent")]
    assert world.judgements[-1][0] - start < 2.0


def test_a_hung_engine_in_a_live_process_is_found_after_the_floor():
    world = World(2)
    world["a"].busy = True
    world.run(10)
    world["a"].rate = 0
    world.run(8)
    ((when, who, state, error),) = world.judgements
    assert (who, state) == ("a", "stalled")
    assert 5.0 <= when - 10 < 6.0
    assert isinstance(error, WorkerStalled)
    assert error.details["phase"] == "decode"


def test_an_idle_worker_is_never_stalled():
    world = World(1)
    world["a"].busy = True
    world.run(1)
    world["a"].busy = False
    world.run(600)
    assert world.judgements == []


def test_streams_that_wait_for_a_slow_reader_are_no_hang():
    world = World(1)
    world["a"].busy, world["a"].rate = True, 0
    world["a"].fields, world["a"].load = {"phase": "idle"}, {}
    world.run(60)
    assert world.judgements == []


def test_a_hundred_thousand_token_prefill_is_no_hang_with_or_without_an_estimate():
    for fields in ({"phase": "prefill", "silent_step_seconds": 30.0}, {"phase": "prefill"}):
        world = World(1)
        world["a"].busy, world["a"].rate = True, 0
        world["a"].fields, world["a"].load = fields, {"running": 1, "prefill_tokens": 100_000}
        world.run(80)
        assert world.judgements == []


def test_a_hang_in_prefill_is_found_when_the_engine_knows_its_steps():
    world = World(1)
    world["a"].busy, world["a"].rate = True, 0
    world["a"].fields = {"phase": "prefill", "silent_step_seconds": 2.5}
    world.run(10)
    assert world.states() == [("a", "stalled")]
    assert 7.5 <= world.judgements[0][0] < 8.5


def test_a_long_warm_up_is_no_hang():
    for phase in ("starting", "warming", "compiling"):
        world = World(1)
        world["a"].busy, world["a"].rate, world["a"].fields = True, 0, {"phase": phase}
        world.run(120)
        assert world.judgements == []


def test_an_engine_without_counters_is_never_stalled():
    world = World(1, shows_progress=False)
    world["a"].busy, world["a"].rate = True, 0
    world.run(60)
    assert world.judgements == []


def test_slow_steps_are_no_hang_and_teach_the_bound():
    world = World(1)
    world["a"].busy, world["a"].rate = True, 1 / 4.5
    world.run(60)
    world["a"].rate = 1 / 8.0
    world.run(60)
    assert world.judgements == []


def test_a_freeze_of_a_busy_worker_is_not_also_a_hang():
    world = World(2)
    world["a"].busy = True
    world.run(5)
    world["a"].frozen = True
    world.run(30)
    world["a"].frozen = False
    world["a"].rate = 0.4
    world.run(10)
    assert world.states() == [("a", "silent"), ("a", "ok")]


def test_a_hung_worker_returns_when_its_counters_move():
    world = World(1)
    world["a"].busy = True
    world.run(3)
    world["a"].rate = 0
    world.run(6)
    world["a"].rate = 100
    world.run(1.5)
    assert world.states() == [("a", "stalled"), ("a", "ok")]
    assert not world.detector.on_trial(InstanceId("a"))


def test_a_hung_worker_whose_streams_were_killed_is_tried_later_and_later():
    world = World(1)
    worker = world["a"]
    worker.busy, worker.rate = True, 0
    waits = []
    for _ in range(3):
        worker.busy = True
        while not world.states() or world.states()[-1][1] != "stalled":
            world.run(0.5)
        killed = world.now - 1000
        worker.busy = False
        while world.states()[-1][1] != "ok":
            world.run(0.5)
        waits.append(world.judgements[-1][0] - killed)
        assert world.detector.on_trial(InstanceId("a"))
    assert 5 <= waits[0] < 6.5 <= waits[1] - waits[0] + 2 < waits[2] - waits[1]
    worker.busy, worker.rate = True, 100
    world.run(1)
    assert not world.detector.on_trial(InstanceId("a"))


def test_flapping_makes_coming_back_harder():
    world = World(2)
    backs = []
    for _ in range(5):
        world["a"].frozen = True
        while not world.states() or world.states()[-1] != ("a", "silent"):
            world.run(0.1)
        world["a"].frozen = False
        thawed = world.now - 1000
        while world.states()[-1] != ("a", "ok"):
            world.run(0.1)
        backs.append(world.judgements[-1][0] - thawed)
    assert backs[0] < 1.0
    assert backs[4] > 2 * backs[0]
    assert world.detector.freeze_bound(InstanceId("a"), world.now) > 1.5


def test_forgetting_a_worker_forgets_everything():
    world = World(1)
    world.detector.remove(InstanceId("a"))
    assert world.detector.due_pings(world.now) == []
    assert world.detector.pong(InstanceId("a"), world["a"].pong(1), world.now) is None
    assert world.detector.check(world.now) == []
    world.detector.heard(InstanceId("a"), world.now)
    assert world.detector.state(InstanceId("a")) == "ok"
