"""Whether work can be sent here now, and if not, what is missing.

The rule, in this order:

0. any *hold* (draining, engine dead …) → not ready;
1. endpoints are listed in the settings → ready when all of them are;
2. endpoints that can be probed (*targets*) exist → ready when all of them are;
3. canaries are on and endpoints exist → ready when all of them are;
4. otherwise the plain status: what the settings say at the start, ``ready`` once served.

A target begins as not ready and is moved by consecutive results; an endpoint that cannot be probed is ready
as long as it is served. Every answer that is not ``ready`` has at least one reason.

Must never wait, never measure, and know nothing about engines: the facts are brought here.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from holdfast.health.config import Status


class Verdict(msgspec.Struct, frozen=True):
    """What readiness answers."""

    ready: bool
    endpoints: dict[str, Status]
    reasons: tuple[str, ...] = ()
    """What is missing, a sentence each; empty when ready."""

    @property
    def status(self) -> Status:
        """The word in the answer."""
        return "ready" if self.ready else "notready"


class _Endpoint:
    """One served endpoint; ``registration`` is 0 while it cannot be probed."""

    __slots__ = ("failures", "ok", "registration", "successes", "why")

    def __init__(self, registration: int):
        self.registration = registration
        self.ok = registration == 0
        self.why = "no successful probe yet"
        self.failures = 0
        self.successes = 0


class Readiness:
    """See the module.

    Args:
        starting: the plain status before `serve`.
        listed: endpoints that alone decide, if any.
        failures: consecutive failed results that make a target not ready.
        successes: consecutive good ones that make it ready.
        canary: whether idle canaries are on (rule 3).
        on_change: called with the new verdict whenever it differs from the last.
    """

    def __init__(
        self,
        *,
        starting: Status = "notready",
        listed: tuple[str, ...] = (),
        failures: int = 2,
        successes: int = 1,
        canary: bool = False,
        on_change: Callable[[Verdict], None] = lambda _: None,
    ):
        self._plain = starting
        self._stage = "the process is starting"
        self._listed = listed
        self._failures, self._successes = failures, successes
        self._canary = canary
        self._on_change = on_change
        self._endpoints: dict[str, _Endpoint] = {}
        self._holds: dict[str, str] = {}
        self._registrations = 0
        self._verdict = self._judge()

    @property
    def verdict(self) -> Verdict:
        """The present answer."""
        return self._verdict

    # what is brought here

    def stage(self, what: str) -> None:
        """Say what the process is doing before it serves; it becomes the reason for not being ready."""
        self._stage = what
        self._update()

    def serve(self) -> None:
        """The plain status is ``ready`` from now on."""
        self._plain = "ready"
        self._update()

    def endpoint(self, name: str) -> None:
        """An endpoint that cannot be probed is served."""
        self._endpoints[name] = _Endpoint(0)
        self._update()

    def target(self, name: str) -> int:
        """An endpoint that can be probed is served; returns the registration that its results must carry.

        Registering again starts anew: results of earlier probes no longer count.
        """
        self._registrations += 1
        self._endpoints[name] = _Endpoint(self._registrations)
        self._update()
        return self._registrations

    def remove(self, name: str) -> None:
        """An endpoint is served no more."""
        self._endpoints.pop(name, None)
        self._update()

    def hold(self, name: str, reason: str) -> None:
        """Not ready until `release`, whatever else is true."""
        self._holds[name] = reason
        self._update()

    def release(self, name: str) -> None:
        """Take a hold back. Unknown names are ignored."""
        if self._holds.pop(name, None) is not None:
            self._update()

    def succeeded(self, name: str, registration: int) -> None:
        """A probe, or real traffic, went through."""
        target = self._target(name, registration)
        if target is None:
            return
        target.failures = 0
        target.successes += 1
        if not target.ok and target.successes >= self._successes:
            target.ok = True
            self._update()

    def failed(self, name: str, registration: int, why: str, *, final: bool = False) -> None:
        """A probe failed.

        Args:
            name: the endpoint.
            registration: as `target` returned it.
            why: the cause, with what was measured; it appears in answers.
            final: a verdict by itself, such as a stall: do not wait for more failures.
        """
        target = self._target(name, registration)
        if target is None:
            return
        target.successes = 0
        target.failures += 1
        target.why = why
        if final or target.failures >= self._failures:
            target.ok = False
        self._update()

    # what is asked

    def is_ready(self, name: str) -> bool:
        """Whether an endpoint is served and, if it can be probed, was last found working."""
        found = self._endpoints.get(name)
        return found is not None and found.ok

    def failures(self, name: str) -> int:
        """How many probes in a row have failed."""
        found = self._endpoints.get(name)
        return 0 if found is None else found.failures

    def _target(self, name: str, registration: int) -> _Endpoint | None:
        found = self._endpoints.get(name)
        return found if found is not None and found.registration == registration else None

    def _update(self) -> None:
        before, self._verdict = self._verdict, self._judge()
        if before != self._verdict:
            self._on_change(self._verdict)

    def _judge(self) -> Verdict:
        endpoints: dict[str, Status] = {n: "ready" if e.ok else "notready" for n, e in self._endpoints.items()}
        reasons = (*self._holds.values(), *self._missing())
        return Verdict(not reasons, endpoints, reasons)

    def _missing(self) -> list[str]:
        deciding = self._deciding()
        if deciding is None:
            return [] if self._plain == "ready" else [self._stage]
        return [reason for name in deciding if (reason := self._reason(name))]

    def _deciding(self) -> list[str] | None:
        """Return the endpoints that decide; None: the plain status does."""
        if self._listed:
            return list(self._listed)
        targets = [name for name, endpoint in self._endpoints.items() if endpoint.registration]
        if targets:
            return targets
        return list(self._endpoints) if self._canary and self._endpoints else None

    def _reason(self, name: str) -> str:
        endpoint = self._endpoints.get(name)
        if endpoint is None:
            if not self._endpoints and self._plain != "ready":
                return f"endpoint {name} is not served yet: {self._stage}"
            served = ", ".join(self._endpoints) or "none"
            return (
                f"endpoint {name} is named by DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS, but this process serves {served}"
            )
        return "" if endpoint.ok else f"endpoint {name}: {endpoint.why}"
