"""Every configuration of every process, by section: what `holdfast config`, `--help` and the docs list.

Must never load an engine, only the modules that hold settings.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable

import msgspec

from holdfast.base.settings import Field, fields_of

CONFIG_FILE = "DYN_CONFIG_FILE"
"""The TOML file that every command reads; also the flag --config-file."""

ENGINES = ("llamacpp", "mock")
"""Engines that `holdfast worker` can host."""

_SECTIONS = {
    "serve": ("Local cluster", "holdfast.local.config", "ServeConfig"),
    "frontend": ("Frontend", "holdfast.frontend.config", "FrontendConfig"),
    "worker": ("Worker", "holdfast.worker.config", "WorkerConfig"),
    "llamacpp": ("Engine llamacpp", "holdfast.engines.llamacpp.config", "LlamaCppConfig"),
    "mock": ("Engine mock", "holdfast.engines.mock.config", "MockConfig"),
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
    return sorted({CONFIG_FILE, *(name for field in fields for name in (field.env, *field.aliases))})
