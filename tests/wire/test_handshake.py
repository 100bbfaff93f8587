"""Before the first stream: versions, identity and the secret, each refusal with a sentence that helps."""

import random

import msgspec
import pytest

from holdfast.base.errors import (
    CannotConnect,
    CapacityExhausted,
    ErrorInfo,
    HoldfastError,
    ProtocolViolation,
    SecretMismatch,
    VersionMismatch,
    WorkerDraining,
    WrongInstance,
)
from holdfast.wire.caller import CallerConnection
from holdfast.wire.codec import encode
from holdfast.wire.frames import VERSION, Challenge, Ping, Refuse, Welcome
from holdfast.wire.worker import Joined, WorkerConnection
from tests.wire.pairs import NONCE, Pair, hello

SECRET = b"a shared secret"


@pytest.mark.parametrize("secret", [b"", SECRET])
@pytest.mark.parametrize("seed", range(5))
def test_both_sides_agree(secret: bytes, seed: int) -> None:
    pair = Pair(secret=secret, rng=random.Random(seed), instance="w1", epoch=77)
    pair.exchange()
    assert pair.caller.state == pair.worker.state == "ready"
    assert pair.caller.version == pair.worker.version == VERSION
    assert pair.caller.welcome is not None
    assert (pair.caller.welcome.instance, pair.caller.welcome.epoch) == ("w1", 77)


def refused(**changes: object) -> HoldfastError:
    """Return the error the caller sees; the worker must see the same class."""
    pair = Pair(**changes)  # type: ignore[arg-type]
    with pytest.raises(HoldfastError) as at_worker:
        pair.exchange()
    with pytest.raises(type(at_worker.value)) as at_caller:
        pair.to_caller()
    assert pair.worker.state == "closed"
    return at_caller.value


@pytest.mark.parametrize("versions", [(VERSION + 1, VERSION + 5), (0, 0)])
def test_disjoint_versions_are_refused_naming_both(versions: tuple[int, int]) -> None:
    error = refused(version_min=versions[0], version_max=versions[1])
    assert isinstance(error, VersionMismatch)
    assert f"{versions[0]} to {versions[1]}" in error.message
    assert f"1 to {VERSION}" in error.message


def test_overlapping_versions_choose_the_newest_common_one() -> None:
    pair = Pair(version_min=1, version_max=VERSION + 7)
    pair.exchange()
    assert pair.worker.version == VERSION
    pair = Pair(version_min=1, version_max=1)
    pair.exchange()
    assert pair.caller.version == 1


@pytest.mark.parametrize("expected", [{"instance": "other"}, {"instance": "w1", "epoch": 78}])
def test_somebody_else_at_the_address_is_refused(expected: dict[str, object]) -> None:
    error = refused(**expected)
    assert isinstance(error, WrongInstance)
    assert error.retry == "elsewhere"


def test_a_caller_with_another_secret_is_refused() -> None:
    pair = Pair(secret=SECRET)
    pair.caller = CallerConnection(hello(), b"another")
    with pytest.raises(SecretMismatch):
        pair.exchange()
    with pytest.raises(SecretMismatch):
        pair.to_caller()


def test_a_caller_without_secret_says_so() -> None:
    pair = Pair(secret=SECRET)
    pair.caller = CallerConnection(hello())
    with pytest.raises(SecretMismatch, match="has none"):
        pair.exchange()
    assert refused(secret=SECRET, nonce=b"")


def test_a_worker_that_does_not_prove_itself_is_not_trusted() -> None:
    caller = CallerConnection(hello(), SECRET)
    with pytest.raises(SecretMismatch):
        caller.receive(bytes(encode(Welcome(VERSION, "w1", 77))))
    caller = CallerConnection(hello(), SECRET)
    caller.receive(bytes(encode(Challenge(b"w" * 16))))
    with pytest.raises(SecretMismatch):
        caller.receive(bytes(encode(Welcome(VERSION, "w1", 77, (), b"\0" * 32))))


def test_a_proof_played_back_in_the_other_direction_is_worth_nothing() -> None:
    caller = CallerConnection(hello(), SECRET)
    caller.outbox.take()
    caller.receive(bytes(encode(Challenge(NONCE))))
    proof = msgspec.msgpack.decode(bytes(caller.outbox.take())[4:])[1]
    with pytest.raises(SecretMismatch):
        caller.receive(bytes(encode(Welcome(VERSION, "tester", 77, (), proof))))


def test_nothing_is_legal_before_the_welcome() -> None:
    worker = WorkerConnection("w1", 77, lambda *_: None)
    with pytest.raises(ProtocolViolation, match=r"'joining'") as caught:
        worker.receive(bytes(encode(hello())) + bytes(encode(Ping(1))))
    assert caught.value.details["frame"] == "ping"


@pytest.mark.parametrize(
    "changes", [{"caller": ""}, {"caller": "x" * 300}, {"caller": "two\nlines"}, {"channel": "third"}]
)
def test_a_hello_that_makes_no_sense_is_refused(changes: dict[str, object]) -> None:
    worker = WorkerConnection("w1", 77, lambda *_: None)
    with pytest.raises(ProtocolViolation):
        worker.receive(bytes(encode(hello(**changes))))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("worker_draining", WorkerDraining),
        ("capacity_exhausted", CapacityExhausted),
        ("invalid_api_key", CannotConnect),
        ("no such code", CannotConnect),
    ],
)
def test_a_refused_connection_never_blames_the_client(code: str, expected: type[HoldfastError]) -> None:
    caller = CallerConnection(hello())
    with pytest.raises(expected) as caught:
        caller.receive(bytes(encode(Refuse(0, ErrorInfo(code, "no", "caller", "never", {"message": 1, "self": 2})))))
    assert caught.value.fault != "caller"


def test_the_owner_can_turn_a_caller_away() -> None:
    pair = Pair()
    events = pair.worker.receive(bytes(pair.caller.outbox.take()))
    assert isinstance(events[0], Joined)
    pair.worker.turn_away(CapacityExhausted("full", limit="CALLERS_PER_WORKER"))
    with pytest.raises(CapacityExhausted, match="full"):
        pair.to_caller()
