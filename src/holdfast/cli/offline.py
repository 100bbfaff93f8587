"""What the commands on a virtual clock have in common: the settings of the simulated cluster, and their variants.

Must never run anything.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import msgspec

from holdfast.base.errors import InvalidRequest
from holdfast.base.settings import fields_of
from holdfast.cli.catalogue import sections
from holdfast.cli.options import Flags
from holdfast.engines.mock.config import MockConfig, ProfileName
from holdfast.engines.mock.profiles import PROFILES, applied
from holdfast.frontend.config import FrontendConfig
from holdfast.replay.simulated import Settings
from holdfast.sim.guard import ensure_hash_seed
from holdfast.worker.config import WorkerConfig

EngineDefault: TypeAlias = ProfileName
SECTIONS = ("frontend", "worker", "mock")
MOST_PROCESSES = 256
EXIT_INTERRUPTED = 130
_OWN: dict[str, type] = {"workers": int, "frontends": int, "rate": float, "concurrency": int, "profile": str}
"""Flags that are no settings and can be compared all the same."""


def ensure_repeatable() -> None:
    """Start this program anew with fixed hashes of strings, if need be: results repeat only then."""
    ensure_hash_seed()


def interruptible(work: Callable[[], int]) -> int:
    """Do some work and return its exit code; Ctrl-C ends it without a report."""
    try:
        return work()
    except KeyboardInterrupt:
        print("holdfast: interrupted; nothing is reported.", file=sys.stderr)
        return EXIT_INTERRUPTED


def cluster_settings(flags: Flags, own: dict[str, Any], profile: EngineDefault) -> Settings:
    """Return the settings of the simulated cluster.

    Args:
        flags: with the settings of frontend, worker and mock engine.
        own: ``workers``, ``frontends`` and ``profile`` of the command line.
        profile: of the engines, when none is named.

    Raises:
        InvalidRequest: a number of processes or a profile that cannot be.
    """
    for name in ("workers", "frontends"):
        if not 1 <= own[name] <= MOST_PROCESSES:
            raise InvalidRequest(f"--{name} {own[name]}: expected 1 to {MOST_PROCESSES}.")
    if own["profile"] and own["profile"] not in PROFILES:
        raise InvalidRequest(f"--profile {own['profile']}: there is {', '.join(PROFILES)}.")
    loaded = flags.load(MockConfig, "mock")
    engine = loaded.config
    if own["profile"] or loaded.origins["profile"].source == "default":
        engine = msgspec.structs.replace(engine, profile=own["profile"] or profile)
    return Settings(
        workers=own["workers"],
        frontends=own["frontends"],
        frontend=flags.load(FrontendConfig, "frontend").config,
        worker=flags.load(WorkerConfig, "worker").config,
        engine=applied(engine),
    )


def variants(flags: Flags, own: dict[str, Any], compare: str) -> Iterator[tuple[str, Flags, dict[str, Any]]]:
    """Yield title, settings and own flags of each run that is wanted.

    Args:
        flags: settings of the command line.
        own: the rest of it.
        compare: ``flag=value,value``; empty: one run with an empty title.

    Raises:
        InvalidRequest: no such flag, or no value.
    """
    if not compare:
        yield "", flags, own
        return
    name, _, listed = compare.partition("=")
    name, values = name.strip().removeprefix("--"), [value.strip() for value in listed.split(",") if value.strip()]
    known = {field.flag for part in sections(SECTIONS) for field in fields_of(part.config_type)}
    if not values or (name not in known and name not in _OWN):
        raise InvalidRequest(
            f"--compare {compare}: expected a setting and its values, as in router-mode=round-robin,least-loaded; "
            f"beside all settings of frontend, worker and mock engine there is {', '.join(_OWN)}."
        )
    for value in values:
        if name in _OWN:
            yield f"{name} {value}", flags, {**own, name: _converted(name, value)}
        else:
            yield f"{name} {value}", Flags({**flags.values, name: value}, flags.file), own


def _converted(name: str, value: str) -> Any:
    try:
        return _OWN[name](value)
    except ValueError:
        raise InvalidRequest(f"--compare {name}={value}: not a number.") from None
