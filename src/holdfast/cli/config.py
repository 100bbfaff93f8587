"""`holdfast config`: every setting, its value and where it comes from. Must never show a secret."""

from __future__ import annotations

import json
import os
from typing import Annotated

import msgspec
import typer

from holdfast.base.settings import Loaded, near_misses, unknown_names
from holdfast.cli.app import parameter, takes_settings
from holdfast.cli.catalogue import Section, known_variables, sections, unknown_keys
from holdfast.cli.options import Flags, Process
from holdfast.kv.choice import describe, implementation

_ALL = Process(tuple(part.name for part in sections()), lambda _: 0)
_JSON = parameter("as_json", Annotated[bool, typer.Option("--json", help="JSON, for machines.")], False)
_CHANGED = parameter(
    "changed", Annotated[bool, typer.Option("--changed", help="Only settings that differ from their default.")], False
)


@takes_settings(_ALL, _JSON, _CHANGED)
def command(flags: Flags, *, as_json: bool, changed: bool) -> int:
    """Show every setting with its value and where it comes from.

    Takes the same flags, variables and file as the other commands, so that it answers what they would use.
    Secrets are masked. DYN_* variables that no setting reads are listed, with the name that was probably meant.
    """
    loaded = [(part, flags.load(part.config_type, part.name)) for part in sections()]
    known = known_variables()
    warnings, strange = near_misses(os.environ, known), unknown_names(os.environ, known)
    warnings += unknown_keys(flags.config_file) if flags.config_file else []
    if as_json:
        rows = [row for part, values in loaded for row in _rows(part, values, changed)]
        report = {"settings": rows, "warnings": warnings, "unknown": strange, "kv_index": implementation()}
        print(json.dumps(report, indent=2, default=str))
    else:
        for part, values in loaded:
            _print(part, values, changed)
        for name in strange:
            print(f"{name} is set, but no setting reads it.")
        if not changed:
            print(describe())
    return 0


def _rows(part: Section, loaded: Loaded[msgspec.Struct], changed: bool) -> list[dict[str, object]]:
    return [
        {
            "section": part.name,
            "name": field.name,
            "value": loaded.shown(field) if field.secret else loaded.value(field),
            "origin": loaded.origins[field.name].source,
            "from": loaded.origins[field.name].name,
            "flag": f"--{field.flag}",
            "env": field.env,
            "help": field.help,
        }
        for field in part.fields
        if not changed or loaded.origins[field.name].source != "default"
    ]


def _print(part: Section, loaded: Loaded[msgspec.Struct], changed: bool) -> None:
    lines = [
        (f"--{field.flag}", loaded.shown(field), str(loaded.origins[field.name]))
        for field in part.fields
        if not changed or loaded.origins[field.name].source != "default"
    ]
    if not lines:
        return
    wide = [max(len(line[i]) for line in lines) for i in range(2)]
    print(f"{part.title}:")
    for flag, value, origin in lines:
        print(f"  {flag:<{wide[0]}}  {value:<{min(wide[1], 40)}}  {origin}")
    print()
