"""What the supervisor says of itself and its slots over HTTP: the same status server that every process has.

``/health`` is ready while a frontend and a worker run; its endpoints are the slots. ``/metrics`` has what no child can
say of itself: that it is gone, and how often it has come back. Must never decide what is restarted.
"""

from __future__ import annotations

from typing import Any, get_args

from holdfast.health.config import Status, SystemConfig
from holdfast.health.readiness import Verdict
from holdfast.health.status import StatusServer
from holdfast.local.rolling import Rolling
from holdfast.local.supervisor import Slot, SlotState, Supervisor
from holdfast.telemetry.catalogue import CATALOGUE
from holdfast.telemetry.metric import Registry

_STATES: tuple[SlotState, ...] = get_args(SlotState)


class SupervisorVitals:
    """See the module.

    Args:
        config: where to listen.
        supervisor: whose slots are shown.
        rolling: whose restarts are counted.
    """

    def __init__(self, config: SystemConfig, supervisor: Supervisor, rolling: Rolling):
        self._supervisor, self._rolling = supervisor, rolling
        self.registry = r = Registry(CATALOGUE, "supervisor")
        r.watch_process()
        self._slots = r.gauge("holdfast_supervisor_slot_state")
        self._restarts = r.counter("holdfast_supervisor_restarts_total")
        self._rounds = r.counter("holdfast_supervisor_rolling_restarts_total").labels()
        self._rolls = r.gauge("holdfast_supervisor_rolling_restart_under_way").labels()
        self._counted = dict.fromkeys(supervisor.slots, 0)
        self._ended = 0
        self.status = StatusServer(
            config, metrics=r.render, refresh=self.refresh, more=self._facts, judge=lambda: self.verdict
        )

    def start(self) -> None:
        """Answer from now on. Raises Conflict when the port is taken."""
        self.status.start()
        self.status.arm()

    @property
    def verdict(self) -> Verdict:
        """Whether anything is served by what runs here."""
        slots = self._supervisor.slots
        endpoints: dict[str, Status] = {
            name: "ready" if slot.state == "running" else "notready" for name, slot in slots.items()
        }
        reasons = ["everything is being stopped"] if self._supervisor.stopping else []
        by_role: dict[str, list[Slot]] = {}
        for name, slot in slots.items():
            by_role.setdefault(name.rpartition("-")[0], []).append(slot)
        reasons += [
            f"no {role} runs: {', '.join(f'{slot.spec.slot} {slot.state}' for slot in members)}"
            for role, members in by_role.items()
            if all(slot.state != "running" for slot in members)
        ]
        return Verdict(not reasons, endpoints, tuple(reasons))

    def refresh(self) -> None:
        """Bring the metrics up to date; on the event loop."""
        for name, slot in self._supervisor.slots.items():
            for state in _STATES:
                self._slots.labels(name, state).set(slot.state == state)
            self._restarts.labels(name).inc(slot.restarts - self._counted[name])
            self._counted[name] = slot.restarts
        number = self._rolling.report.number
        self._rounds.inc(number - self._ended)
        self._ended = number
        self._rolls.set(bool(self._rolling.under_way))

    def _facts(self) -> dict[str, Any]:
        return {
            "slots": {
                name: {"state": slot.state, "pid": slot.pid, "restarts": slot.restarts}
                for name, slot in self._supervisor.slots.items()
            }
        }
