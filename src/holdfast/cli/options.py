"""From settings to flags, and the short way of the process commands that does without typer.

A `Process` names the sections whose settings a command takes as flags and the function that runs it. Flags
are collected as text by flag; `base.settings.load` converts them, so that a wrong value reads the same
whether it came by flag, variable or file.

Must never import typer or rich.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from holdfast.base.errors import Conflict, HoldfastError
from holdfast.base.lineage import SLOT
from holdfast.base.settings import ConfigT, Field, InvalidSetting, Loaded, fields_of, load, near_misses
from holdfast.cli.catalogue import CONFIG_FILE, Section, known_variables, section, unknown_keys
from holdfast.local.backoff import EXIT_CONFIGURATION
from holdfast.telemetry.logs import LogConfig, setup_logging

EXIT_USAGE = 2
_SWITCHES = {"--no-": "false", "--": "true"}


class Flags(msgspec.Struct, frozen=True):
    """What the command line said: values by flag, and the configuration file."""

    values: dict[str, str] = {}
    file: Path | None = None
    rest: tuple[str, ...] = ()
    """Words for an engine's own command line, in their order."""

    @property
    def config_file(self) -> Path | None:
        """The file by flag, or by variable."""
        by_variable = os.environ.get(CONFIG_FILE)
        return self.file or (Path(by_variable) if by_variable else None)

    def load(self, config_type: type[ConfigT], section: str) -> Loaded[ConfigT]:
        """Load the settings of one section with these flags and the environment. Raises InvalidSetting."""
        given = {field.name: self.values.get(field.flag) for field in fields_of(config_type)}
        return load(config_type, given, os.environ, self.config_file, section)


class Process(msgspec.Struct, frozen=True):
    """A subcommand that is nothing but settings and a function."""

    sections: tuple[str, ...]
    run: Callable[[Flags], int]
    narrow: Callable[[Sequence[str]], tuple[str, ...]] | None = None
    """Returns the sections that a command line is about; then unknown flags are kept in `Flags.rest`. Empty: all."""


class UsageError(Exception):
    """A flag that does not exist, or lacks its value."""


def parse_flags(argv: Sequence[str], fields: Sequence[Field], *, keep: bool = False) -> Flags:
    """Return the flags in ``--name value``, ``--name=value``, ``--switch`` and ``--no-switch`` form.

    Args:
        argv: the words.
        fields: settings that are known.
        keep: flags that are not known are kept in `Flags.rest`, with the words that follow them.

    Raises:
        UsageError: with the nearest flag that exists.
    """
    by_flag = {field.flag: field for field in fields}
    values: dict[str, str] = {}
    file: Path | None = None
    rest: list[str] = []
    foreign = False
    words = iter(argv)
    for word in words:
        name, given, value = word.partition("=")
        if foreign and not _is_flag(word):
            rest.append(word)
            continue
        foreign = False
        if name == "--config-file":
            file = Path(value if given else _next(words, name))
            continue
        switch = _switch(name, by_flag)
        if switch is not None and not given:
            values[switch[0].flag] = switch[1]
            continue
        field = by_flag.get(name[2:]) if name.startswith("--") else None
        if field is None and keep and _is_flag(word):
            foreign = True
            rest.append(word)
            continue
        if field is None:
            raise UsageError(_unknown(name, by_flag))
        values[field.flag] = value if given else _next(words, name)
    return Flags(values, file, tuple(rest))


def _is_flag(word: str) -> bool:
    """Whether a word names a flag: ``--name`` or ``-n``, not a negative number."""
    return word.startswith("-") and word != "-" and not word[1:2].isdigit() and word[1:2] != "."


def run_process(process: Process, argv: Sequence[str]) -> int:
    """Run a process command the short way; return its exit code."""
    narrow = process.narrow(argv) if process.narrow is not None else ()
    fields = [field for name in narrow or process.sections for field in section(name).fields]
    try:
        flags = parse_flags(argv, fields, keep=bool(narrow))
    except UsageError as error:
        print(f"holdfast: {error}", file=sys.stderr)
        return EXIT_USAGE
    return run_guarded(process, flags)


def run_guarded(process: Process, flags: Flags) -> int:
    """Run a process command; settings that can never work exit with a code that nobody restarts."""
    warn_near_misses(flags)
    try:
        return process.run(flags)
    except InvalidSetting as error:
        print(f"holdfast: {error.message}", file=sys.stderr)
        return EXIT_CONFIGURATION
    except HoldfastError as error:
        print(f"holdfast: {error.message} {error.hint}".rstrip(), file=sys.stderr)
        # a missing model file stays missing; a taken port may become free
        return EXIT_CONFIGURATION if error.fault == "caller" and not isinstance(error, Conflict) else 1


def warn_near_misses(flags: Flags) -> None:
    """Warn about DYN_* names that look like typing errors, and about keys of the file that no setting reads."""
    warnings = unknown_keys(flags.config_file) if flags.config_file else []
    if any(name.startswith("DYN_") for name in os.environ):
        warnings += near_misses(os.environ, known_variables())
    for warning in warnings:
        print(f"holdfast: warning: {warning}", file=sys.stderr)


def passed_on(flags: Flags, parts: Sequence[Section], own: frozenset[str]) -> tuple[str, ...]:
    """Return the given flags that these sections know, but for ``own``, as a child's command line.

    Secrets are left out: they go by environment.
    """
    known = {field.flag for part in parts for field in part.fields if not field.secret} - own
    given = [f"--{flag}={value}" for flag, value in flags.values.items() if flag in known]
    return (*given, *((f"--config-file={flags.file}",) if flags.file else ()))


def log_to_stderr(flags: Flags, role: str) -> None:
    """Set up the logs of a process; under a supervisor the slot's name takes the place of the role."""
    config = flags.load(LogConfig, "log").config
    slot = os.environ.get(SLOT, "")
    setup_logging(config, (slot or role) if config.as_json or not slot else "")


def _next(words: object, name: str) -> str:
    value = next(words, None)  # type: ignore[call-overload]
    if not isinstance(value, str):
        raise UsageError(f"{name} needs a value.")
    return value


def _switch(name: str, by_flag: Mapping[str, Field]) -> tuple[Field, str] | None:
    for prefix, value in _SWITCHES.items():
        field = by_flag.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if field is not None and field.is_bool:
            return field, value
    return None


def _unknown(name: str, by_flag: Mapping[str, Field]) -> str:
    if not name.startswith("--"):
        return f"unexpected argument {name!r}; settings are given as --flag value."
    close = difflib.get_close_matches(name[2:], list(by_flag), n=1)
    meant = f" Did you mean --{close[0]}?" if close else ""
    return f"there is no flag {name}.{meant} See --help."
