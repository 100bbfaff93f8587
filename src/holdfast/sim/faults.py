"""The vocabulary of faults: what can go wrong, to whom, when and for how long. Plain data, the same for simulated and
for real processes.

Durations are drawn on the scale of what they threaten, or a fault is over before (or long after) anybody could be hurt
by it: a freeze around the detector's bound, a gap around an engine's step, a hang around the detector's floor.

Must never act.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

Moment = Literal["now", "dispatch", "accept", "first", "stream", "end"]
"""When within a stream's life the fault strikes: any time; an attempt goes out to the target; its engine has taken it;
it brings the first token; it brings further ones; it brings the last one."""


class Fault(msgspec.Struct, frozen=True, tag_field="kind", omit_defaults=True, kw_only=True):
    """One thing that goes wrong. Times in seconds since the run began."""

    at: float
    target: str = ""
    """Name of the process; empty: no single one."""
    moment: Moment = "now"
    """From ``at`` on the first such moment of the target is awaited, for `PATIENCE` seconds at most."""
    duration: float = 0.0

    @property
    def kind(self) -> str:
        """Its name."""
        return str(self.__struct_config__.tag)


class Crash(Fault, tag="crash", frozen=True, kw_only=True):
    """The process is killed; a supervisor starts it again on the same address after ``duration``."""


class PowerLoss(Fault, tag="power-loss", frozen=True, kw_only=True):
    """The machine is gone without a word: its peers' connections just fall silent. Back after ``duration``."""


class Freeze(Fault, tag="freeze", frozen=True, kw_only=True):
    """SIGSTOP, and SIGCONT after ``duration``."""


class Terminate(Fault, tag="terminate", frozen=True, kw_only=True):
    """SIGTERM: it leaves in order; a new one takes its place ``duration`` after it has gone."""

    signals: int = 1
    """Two: a second one comes after 0.2 s, and it hurries."""


class Slow(Fault, tag="slow", frozen=True, kw_only=True):
    """Everything that the process does takes ``factor`` times as long."""

    factor: float = 4.0


class Partition(Fault, tag="partition", frozen=True, kw_only=True):
    """No byte passes from ``target`` to ``peer`` (and back, unless ``one_way``)."""

    peer: str = ""
    one_way: bool = False


class Reset(Fault, tag="reset", frozen=True, kw_only=True):
    """All connections between ``target`` and ``peer`` are reset."""

    peer: str = ""


class Delay(Fault, tag="delay", frozen=True, kw_only=True):
    """Everything between ``target`` and ``peer`` takes ``seconds`` longer."""

    peer: str = ""
    seconds: float = 0.2


class DiscoveryOutage(Fault, tag="discovery-outage", frozen=True, kw_only=True):
    """Nobody reaches discovery."""


class DiscoveryStale(Fault, tag="discovery-stale", frozen=True, kw_only=True):
    """The target's view of discovery stands still."""


class DiscoveryPartial(Fault, tag="discovery-partial", frozen=True, kw_only=True):
    """The target does not see some of the workers."""

    hidden: tuple[str, ...] = ()


class EngineError(Fault, tag="engine-error", frozen=True, kw_only=True):
    """The next ``times`` sequences of the target's engine end with an error."""

    times: int = 1


class EngineAbort(Fault, tag="engine-abort", frozen=True, kw_only=True):
    """The next ``times`` sequences end early without a reason."""

    times: int = 1


class EngineRefuse(Fault, tag="engine-refuse", frozen=True, kw_only=True):
    """The next ``times`` submissions are refused."""

    times: int = 1


class EngineHang(Fault, tag="engine-hang", frozen=True, kw_only=True):
    """The engine stands still in a process that answers."""


class EngineSlow(Fault, tag="engine-slow", frozen=True, kw_only=True):
    """Every step takes ``factor`` times as long."""

    factor: float = 4.0


class EngineCompile(Fault, tag="engine-compile", frozen=True, kw_only=True):
    """A silent step of ``duration`` seconds that the engine announces."""


class EngineMiscount(Fault, tag="engine-miscount", frozen=True, kw_only=True):
    """The next steps carry an output index that is off by ``shift``: a gap, or a repetition."""

    shift: int = 1
    times: int = 1


class KvLost(Fault, tag="kv-lost", frozen=True, kw_only=True):
    """The next ``times`` KV events of the target get lost, on their way from its engine or to the frontends."""

    times: int = 1
    where: Literal["engine", "wire"] = "wire"


class KvRepeated(Fault, tag="kv-repeated", frozen=True, kw_only=True):
    """They come twice."""

    times: int = 1
    where: Literal["engine", "wire"] = "wire"


class KvReordered(Fault, tag="kv-reordered", frozen=True, kw_only=True):
    """They come after those that follow them."""

    times: int = 1
    where: Literal["engine", "wire"] = "wire"


class OutOfMemory(Fault, tag="out-of-memory", frozen=True, kw_only=True):
    """The engine dies and says so; its process leaves and is started again after ``duration``."""


class WallJump(Fault, tag="wall-jump", frozen=True, kw_only=True):
    """The target's calendar clock jumps by ``seconds``."""

    seconds: float = 3600.0


class Overload(Fault, tag="overload", frozen=True, kw_only=True):
    """``times`` more requests arrive at once."""

    times: int = 12


class RollingRestart(Fault, tag="rolling-restart", frozen=True, kw_only=True):
    """All processes of the role ``target`` (``worker`` or ``frontend``) are replaced, one after the other."""


class KillerPrompt(Fault, tag="killer-prompt", frozen=True, kw_only=True):
    """A request arrives that kills every worker that computes its prompt."""


AnyFault: TypeAlias = (
    Crash
    | PowerLoss
    | Freeze
    | Terminate
    | Slow
    | Partition
    | Reset
    | Delay
    | DiscoveryOutage
    | DiscoveryStale
    | DiscoveryPartial
    | EngineError
    | EngineAbort
    | EngineRefuse
    | EngineHang
    | EngineSlow
    | EngineCompile
    | EngineMiscount
    | KvLost
    | KvRepeated
    | KvReordered
    | OutOfMemory
    | WallJump
    | Overload
    | KillerPrompt
    | RollingRestart
)
PATIENCE = 2.0
"""Seconds that a fault waits for its moment; then it strikes all the same."""
CLIENT_KINDS = ("client-leaves", "client-slow", "client-stalls", "client-deadline", "client-mistake")
"""What clients do by themselves; drawn with the workload and counted like faults."""


def kinds() -> tuple[str, ...]:
    """Return the names of all faults of processes, network, discovery and engines."""
    return tuple(sorted(str(kind.__struct_config__.tag) for kind in Fault.__subclasses__()))
