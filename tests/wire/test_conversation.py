"""Random conversations, delivered in random pieces: every stream is a prefix of one true sequence, or whole."""

import random

import pytest

from holdfast.base.errors import EngineFailed
from holdfast.wire.caller_stream import CallerStream
from holdfast.wire.frames import OpenHeaders
from holdfast.wire.worker_stream import WorkerStream
from tests.wire.pairs import Pair, Ref, Sink, Token


def truth(stream: int, index: int) -> int:
    return (stream * 7919 + index * 31) % 50_000


class Conversation:
    """Drives both machines with random steps; `check` compares what arrived with what is true."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.pair = Pair(rng=self.rng, secret=b"s" if seed % 2 else b"")
        self.pair.exchange()
        self.sinks: dict[int, Sink] = {}
        self.grips: dict[int, CallerStream] = {}
        self.produced: dict[int, int] = {}
        self.ended: set[int] = set()
        self.killed: set[int] = set()
        self.first: dict[int, int] = {}

    def step(self) -> None:
        common = [self.generate, self.credit, self.move]
        action = self.rng.choice(
            [*common, *common, self.open, self.answer, self.end, self.leave, self.pause, self.ping]
        )
        action()

    def open(self) -> None:
        if len(self.sinks) < 40 and self.pair.caller.state == "ready":
            sink, first = Sink(), self.rng.choice([0, 0, 17])
            grip = self.pair.caller.open(
                "generate",
                _HEADERS,
                b"x" * self.rng.randint(0, 900),
                sink,
                credit=self.rng.randint(1, 30),
                first_index=first,
            )
            self.sinks[grip.id], self.grips[grip.id], self.first[grip.id] = sink, grip, first

    def answer(self) -> None:
        for stream in self.pair.worker.streams:
            if stream.state == "opened":
                if self.rng.random() < 0.85:
                    self.pair.worker.accept(stream)
                    self.produced[stream.id] = self.first[stream.id]
                else:
                    self.pair.worker.refuse(stream, EngineFailed("no"))
                return

    def running(self) -> list[WorkerStream]:
        return [s for s in self.pair.worker.streams if s.state == "accepted" and s.id not in self.ended]

    def generate(self) -> None:
        batch = []
        for stream in self.running():
            if self.rng.random() < 0.8:
                index = self.produced[stream.id]
                count = self.rng.choice([1, 1, 1, 2, 9])
                tokens = [truth(stream.id, index + n) for n in range(count)]
                chances = [(-1.0, [(t, -1.0)]) for t in tokens] if stream.id % 5 == 0 else None
                batch.append(Token(Ref(stream.id), index, tokens, chances))
                self.produced[stream.id] = index + count
        self.pair.worker.send_items(batch)

    def end(self) -> None:
        running = self.running()
        if running:
            stream = self.rng.choice(running)
            self.ended.add(stream.id)
            self.pair.worker.end(stream, "stop")

    def credit(self) -> None:
        if self.grips:
            self.rng.choice(list(self.grips.values())).credit(self.rng.randint(1, 40))

    def leave(self) -> None:
        if self.grips and self.rng.random() < 0.2:
            grip = self.rng.choice(list(self.grips.values()))
            if self.rng.random() < 0.5:
                grip.stop("test")
            else:
                self.killed.add(grip.id)
                grip.kill("test")

    def pause(self) -> None:
        self.pair.worker.paused = not self.pair.worker.paused
        if not self.pair.worker.paused:
            self.pair.worker.release()

    def ping(self) -> None:
        self.pair.caller.ping()

    def move(self) -> None:
        self.pair.to_worker()
        self.pair.to_caller()

    def finish(self) -> None:
        self.pair.worker.paused = False
        for _ in range(200):
            self.answer()
            self.pair.worker.release()
            for grip in self.grips.values():
                grip.credit(1000)
            self.pair.exchange()
        for stream in self.running():
            self.ended.add(stream.id)
            self.pair.worker.end(stream, "stop")
        for stream in self.pair.worker.streams:
            self.pair.worker.end(stream, "cancelled")
        self.pair.exchange()

    def check(self) -> None:
        stopped = dict(self.pair.stopped)
        for number, sink in self.sinks.items():
            first = self.first[number]
            assert sink.tokens == [truth(number, first + n) for n in range(len(sink.tokens))]
            if sink.final == "end:stop" and number not in stopped:
                assert len(sink.tokens) == self.produced[number] - first
            if sink.final is None:
                assert number in self.killed, "only a killed stream has no end"


_HEADERS = OpenHeaders(request_id="r" * 32)


@pytest.mark.parametrize("seed", range(60))
def test_a_random_conversation_keeps_every_promise(seed: int) -> None:
    conversation = Conversation(seed)
    for _ in range(250):
        conversation.step()
    conversation.finish()
    conversation.check()
    assert conversation.pair.worker.streams == conversation.pair.caller.streams == []
    assert conversation.pair.worker._held_weight == 0
    assert conversation.pair.worker._backlog == {}


def test_the_same_conversation_byte_by_byte() -> None:
    pair = Pair(secret=b"s")

    def across() -> None:
        while pair.caller.outbox or pair.worker.outbox:
            for machine, other in ((pair.caller, pair.worker), (pair.worker, pair.caller)):
                for byte in bytes(machine.outbox.take()):
                    pair_events = other.receive(bytes([byte]))
                    for event in pair_events:
                        if type(event).__name__ == "Joined":
                            pair.worker.join()
                        elif type(event).__name__ == "Opened":
                            pair.opened.append(event.stream)

    across()
    sink = Sink()
    pair.caller.open("generate", _HEADERS, b"payload", sink, first_index=0)
    across()
    pair.worker.accept(pair.opened[0])
    for index in range(20):
        pair.send((pair.opened[0], index, [truth(1, index)]))
    pair.worker.end(pair.opened[0], "stop")
    across()
    assert sink.tokens == [truth(1, n) for n in range(20)]
    assert sink.final == "end:stop"
