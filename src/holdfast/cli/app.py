"""The typer side of the command line: help pages and the interactive subcommands.

Only the subcommand that is asked for is imported; the others appear with their one-line help.

Must never decide anything beyond how flags look.
"""

from __future__ import annotations

import inspect
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast import __version__
from holdfast.base.settings import Field, expectation, render
from holdfast.cli.catalogue import CONFIG_FILE, Section, sections
from holdfast.cli.main import COMMANDS, load_command
from holdfast.cli.options import Flags, Process, run_guarded

HELP = """Serve large language models from many machines and never let go of a client's stream.

Every setting is a flag, a DYN_* variable and a key of the file named by --config-file; flags win over
variables, variables over the file. 'holdfast config' shows what applies and why.
"""


def build_app(argv: Sequence[str]) -> typer.Typer:
    """Return the application, with the subcommand that ``argv`` names loaded and stand-ins for the rest."""
    app = typer.Typer(
        name="holdfast",
        help=HELP,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_root)
    wanted = next((word for word in argv if not word.startswith("-")), None)
    for name, text in COMMANDS.items():
        function: Callable[..., Any] = _stand_in
        epilog: str | None = None
        if name == wanted:
            module = load_command(name)
            function = module.command if hasattr(module, "command") else process_command(module.PROCESS)
            text = inspect.getdoc(function) or text  # noqa: PLW2901  the full text for its own help page
            epilog = getattr(function, "epilog", None)
        app.command(name, help=text, short_help=COMMANDS[name], epilog=epilog)(function)
    return app


def takes_settings(process: Process, *own: inspect.Parameter) -> Callable[[Callable[..., int]], Callable[..., None]]:
    """Give a command every setting of its sections as a flag.

    The decorated function gets `Flags` first, then its own parameters by name.
    """
    parts = sections(process.sections)
    options = list(_options(parts))

    def decorate(function: Callable[..., int]) -> Callable[..., None]:
        names = {parameter.name for parameter in own}

        def command(**given: Any) -> None:
            mine = {key: given.pop(key) for key in names}
            file = given.pop("config_file")
            values = {key.replace("_", "-"): render(value) for key, value in given.items() if value is not None}
            sys.exit(run_guarded(Process(process.sections, lambda f: function(f, **mine)), Flags(values, file)))

        command.__doc__ = function.__doc__
        command.epilog = describe(parts)  # type: ignore[attr-defined]
        command.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in (*own, *options)}
        return command

    return decorate


def process_command(process: Process) -> Callable[..., None]:
    """Return the typer command of a process that is nothing but settings."""
    return takes_settings(process)(process.run)


def parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """Return a keyword parameter for `takes_settings`."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def describe(parts: Sequence[Section], width: int = 0) -> str:
    """Return the settings of several sections as a text for help pages, in click's unwrapped paragraphs."""
    width = width or min(100, shutil.get_terminal_size().columns)
    paragraphs = [f"\b\nSettings from a file:\n  --config-file PATH  {CONFIG_FILE}"]
    said: set[tuple[str, str]] = set()
    for part in parts:
        fields = [field for field in part.fields if (field.flag, field.env) not in said]
        said.update((field.flag, field.env) for field in fields)
        paragraphs.append(f"\b\n{part.title}:")
        paragraphs += ["\b\n" + "\n".join(_entry(field, width)) for field in fields]
    return "\n\n".join(paragraphs)


def _entry(field: Field, width: int) -> Iterator[str]:
    flag = f"--[no-]{field.flag}" if field.is_bool else f"--{field.flag} {_metavar(field)}"
    default = "" if field.secret or field.default in (None, "") else f"  (default: {render(field.default)})"
    yield f"  {flag}  {' '.join((field.env, *field.aliases))}{default}"
    yield from textwrap.wrap(field.help, width, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _metavar(field: Field) -> str:
    if field.choices:
        return "|".join(field.choices)
    word = expectation(field.annotation)
    for start, name in (("a whole number", "INTEGER"), ("a number", "NUMBER"), ("a path", "PATH"), ("values", "LIST")):
        if word.startswith(start):
            return name
    return "JSON" if word.startswith("a JSON") else "TEXT"


def _options(parts: Sequence[Section]) -> Iterator[inspect.Parameter]:
    """Yield one hidden option per flag; `describe` shows them better than a table of two columns could."""
    yield parameter("config_file", Annotated[Path | None, typer.Option("--config-file", hidden=True)], None)
    flags = {field.flag: field for part in parts for field in part.fields}
    for field in flags.values():
        switch = f"--{field.flag}/--no-{field.flag}" if field.is_bool else f"--{field.flag}"
        kind = bool if field.is_bool else str
        yield parameter(field.flag.replace("-", "_"), Annotated[kind | None, typer.Option(switch, hidden=True)], None)


def _stand_in() -> None:
    """Never runs: only the named subcommand is registered for real."""


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"holdfast {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
