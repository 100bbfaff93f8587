"""What the two sides settle before the first stream: version, identity, and that both know the secret.

::

    caller                                    worker
      hello (versions, caller nonce)  ──────▶
                                      ◀──────  challenge (worker nonce)       only with a secret
      auth (mac over both nonces)     ──────▶
                                      ◀──────  welcome (version, instance, epoch, mac)
                                               or refuse (stream 0, typed error)

Each mac is HMAC-SHA256 over a label of its direction and length-prefixed fields, so that neither side's
proof can be played back as the other's. Pure functions; must never draw randomness itself.
"""

from __future__ import annotations

import hashlib
import hmac

from holdfast.base.errors import VersionMismatch, WrongInstance
from holdfast.wire.frames import OLDEST_VERSION, VERSION, Hello, Welcome

NONCE_BYTES = 16


def choose_version(hello: Hello) -> int:
    """Return the newest version both sides speak.

    Raises:
        VersionMismatch: the ranges are disjoint; the message names both.
    """
    chosen = min(hello.version_max, VERSION)
    if chosen < max(hello.version_min, OLDEST_VERSION):
        raise VersionMismatch(
            f"the caller speaks protocol versions {hello.version_min} to {hello.version_max}, "
            f"this worker {OLDEST_VERSION} to {VERSION}",
            caller_versions=[hello.version_min, hello.version_max],
            worker_versions=[OLDEST_VERSION, VERSION],
        )
    return chosen


def check_expectation(hello: Hello, instance: str, epoch: int) -> None:
    """Compare whom the caller expects with who is here.

    Raises:
        WrongInstance: another instance, or another start of it.
    """
    if hello.instance and hello.instance != instance:
        raise WrongInstance(
            f"the caller expects instance {hello.instance} at this address, but here is {instance}",
            expected=hello.instance,
            actual=instance,
        )
    if hello.epoch and hello.epoch != epoch:
        raise WrongInstance(
            f"the caller expects start {hello.epoch:016x} of instance {instance}, but this is start {epoch:016x}",
            expected=f"{hello.epoch:016x}",
            actual=f"{epoch:016x}",
        )


def _mac(secret: bytes, label: bytes, *fields: bytes) -> bytes:
    text = b"".join(len(field).to_bytes(4, "little") + field for field in (label, *fields))
    return hmac.new(secret, text, hashlib.sha256).digest()


def caller_mac(secret: bytes, worker_nonce: bytes, hello: Hello) -> bytes:
    """Return the caller's proof over both nonces, its id and the channel."""
    return _mac(secret, b"holdfast caller", worker_nonce, hello.nonce, hello.caller.encode(), hello.channel.encode())


def worker_mac(secret: bytes, worker_nonce: bytes, hello: Hello, welcome: Welcome) -> bytes:
    """Return the worker's proof over both nonces, the version chosen, its epoch and its instance."""
    facts = f"{welcome.version} {welcome.epoch} {welcome.instance}".encode()
    return _mac(secret, b"holdfast worker", worker_nonce, hello.nonce, facts)


def proves(expected: bytes, given: bytes) -> bool:
    """Compare two macs in constant time."""
    return hmac.compare_digest(expected, given)
