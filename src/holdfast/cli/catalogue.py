"""Every configuration of every process, by section: what `holdfast config`, `--help` and the docs list.

Must never load an engine, only the modules that hold settings.
"""

from __future__ import annotations

import difflib
import importlib
import tomllib
from collections.abc import Iterable
from pathlib import Path

import msgspec

from holdfast.base.settings import Field, fields_of

CONFIG_FILE = "DYN_CONFIG_FILE"
"""The TOML file that every command reads; also the flag --config-file."""

UNSECTIONED = ("DYN_FILE_KV_TTL",)
"""Variables that the runtime reads by itself, so that they work without a command line (`discovery.factory`)."""

ENGINES = ("llamacpp", "mock", "sglang", "trtllm", "vllm")
"""Engines that `holdfast worker` can host."""

OUTSPOKEN = ("sglang", "vllm")
"""Engines with a command line of their own: flags that Holdfast does not know are theirs (setting ``args``)."""

_SECTIONS = {
    "serve": ("Local cluster", "holdfast.local.config", "ServeConfig"),
    "frontend": ("Frontend", "holdfast.frontend.config", "FrontendConfig"),
    "worker": ("Worker", "holdfast.worker.config", "WorkerConfig"),
    "router": ("Router", "holdfast.routerd.config", "RouterConfig"),
    "llamacpp": ("Engine llamacpp", "holdfast.engines.llamacpp.config", "LlamaCppConfig"),
    "mock": ("Engine mock", "holdfast.engines.mock.config", "MockConfig"),
    "sglang": ("Engine sglang", "holdfast.engines.sglang.config", "SglangConfig"),
    "trtllm": ("Engine trtllm", "holdfast.engines.trtllm.config", "TrtllmConfig"),
    "vllm": ("Engine vllm", "holdfast.engines.vllm.config", "VllmConfig"),
    "log": ("Logs", "holdfast.telemetry.logs", "LogConfig"),
}


class Section(msgspec.Struct, frozen=True):
    """One configuration type and the settings in it."""

    name: str
    title: str
    config_type: type[msgspec.Struct]
    fields: tuple[Field, ...]


def section(name: str) -> Section:
    """Return a section by name. Raises KeyError."""
    title, module, attribute = _SECTIONS[name]
    config_type = getattr(importlib.import_module(module), attribute)
    return Section(name, title, config_type, fields_of(config_type))


def sections(names: Iterable[str] = tuple(_SECTIONS)) -> list[Section]:
    """Return several sections, all by default."""
    return [section(name) for name in names]


def known_variables() -> list[str]:
    """Return every DYN_* name that some setting reads."""
    fields = [field for part in sections() for field in part.fields]
    return sorted({CONFIG_FILE, *UNSECTIONED, *(name for field in fields for name in (field.env, *field.aliases))})


def unknown_keys(file: Path) -> list[str]:
    """Return a warning for each key of a settings file that no setting reads; none when it cannot be read."""
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return []  # loading a section says what is wrong with it
    parts = {part.name: {field.name for field in part.fields} for part in sections()}
    found = []
    for key, value in content.items():
        if isinstance(value, dict) and key in parts:
            found += [_stray(file, f"{key}.{inner}", parts[key]) for inner in value if _snake(inner) not in parts[key]]
        elif not any(_snake(key) in names for names in parts.values()):
            found.append(_stray(file, key, {*parts, *(name for names in parts.values() for name in names)}))
    return found


def _stray(file: Path, key: str, known: set[str]) -> str:
    close = difflib.get_close_matches(_snake(key.rpartition(".")[2]), sorted(known), n=1)
    return f"{file}: no setting reads {key}" + (f"; did you mean {close[0]}?" if close else ".")


def _snake(key: str) -> str:
    return key.replace("-", "_")
