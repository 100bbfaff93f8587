"""The record of one run of the suite: what passed, what was measured, on what. `tools/support_matrix.py` reads them."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
from pathlib import Path
from typing import Any, Literal

from holdfast import __version__
from holdfast.engines.contract import EngineInfo
from tests.engines.conformance.recorder import Recorder
from tests.engines.conformance.registry import CHECKS
from tests.engines.conformance.subject import Subject

Verdict = Literal["passed", "failed", "not applicable"]


class Record:
    """Verdicts of one engine, in the order of coming."""

    def __init__(self, subject: Subject):
        self._subject = subject
        self._results: dict[str, dict[str, Any]] = {}
        self.info: EngineInfo | None = None
        self._version = ""
        self._before: dict[str, Any] = {}
        self.shared: Recorder | None = None
        """The engine that most checks have used."""

    def say(self, name: str, verdict: Verdict, facts: dict[str, Any] | None = None, reason: str = "") -> None:
        """Note the verdict of one check."""
        self._results[name] = {
            "verdict": verdict,
            **({"measured": facts} if facts else {}),
            **({"reason": reason} if reason else {}),
        }

    @property
    def complete(self) -> bool:
        """Whether every check has a verdict and none failed."""
        said = {name: result["verdict"] for name, result in self._results.items()}
        return all(said.get(check.name, "failed") != "failed" for check in CHECKS)

    def as_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        subject, info = self._subject, self.info
        return {
            "engine": subject.name,
            "version": info.version if info else self._version,
            "stand_in": subject.stand_in,
            "where": subject.where,
            **({"device": subject.device} if subject.device else {}),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "holdfast": __version__,
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
            "packages": {name: _version(name) for name in subject.packages},
            "capabilities": _capabilities(info) or self._before,
            "complete": self.complete,
            "checks": {check.name: self._results[check.name] for check in CHECKS if check.name in self._results},
        }

    def write(self, folder: Path) -> Path:
        """Write ``<engine>.json`` or ``<engine>-<device>.json`` there.

        Of a record of the same day and version, what was not run now is kept.
        """
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^a-z0-9]+", "-", f"{self._subject.name} {self._subject.device}".lower()).strip("-")
        path = folder / f"{name}.json"
        if path.exists():
            self._keep(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    def _keep(self, before: dict[str, Any]) -> None:
        now = self.as_dict()
        if all(before.get(name) == now[name] for name in ("date", "where", "packages", "stand_in")):
            self._version = before["version"]
            self._before = before["capabilities"]
            self._results = {**before["checks"], **self._results}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _capabilities(info: EngineInfo | None) -> dict[str, Any]:
    if info is None:
        return {}
    can = info.capabilities
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name in can.__struct_fields__
        for value in [getattr(can, name)]
    }
