"""Writes docs/reference from the code: settings, command line, errors, state diagrams and metrics.

``python tools/reference.py`` writes the pages, ``--check`` only says whether they are up to date.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from holdfast.base.errors import HoldfastError
from holdfast.base.settings import Field, expectation, render
from holdfast.cli.catalogue import CONFIG_FILE, sections
from holdfast.cli.main import COMMANDS
from holdfast.requests import states
from holdfast.runtime import shutdown
from holdfast.runtime.member import TRANSITIONS
from holdfast.telemetry.catalogue import metrics_page

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference"
NOTE = "<!-- Written by `make docs`; change the code, not this page. -->\n"


def settings_page() -> str:
    """Return every setting of every process, by section."""
    intro = (
        "A value comes from, in this order: the flag, the `DYN_*` variable, the TOML file named by `--config-file` "
        f"(`{CONFIG_FILE}`), the default. In the file a setting is a key at the top level or in the table of its "
        "section, in snake or kebab case. `holdfast config` shows what applies and why; unknown `DYN_*` names that "
        "look like typing errors are warned about. Switches are `--name` and `--no-name`.\n"
    )
    parts = [f"# Settings\n\n{NOTE}", intro]
    for part in sections():
        parts.append(f"## {part.title} (`[{part.name}]`)\n")
        parts.append("| flag | variable | default | meaning |\n|---|---|---|---|")
        parts += [_row(field) for field in part.fields]
        parts.append("")
    return "\n".join(parts)


def _row(field: Field) -> str:
    default = "" if field.default in (None, "", ()) else f"`{render(field.default)}`"
    kind = expectation(field.annotation).replace("|", "\\|")
    names = ", ".join(f"`{name}`" for name in (field.env, *field.aliases))
    return f"| `--{field.flag}` | {names} | {default} | {field.help} ({kind}) |"


def cli_page() -> str:
    """Return the help page of every command."""
    parts = [f"# Command line\n\n{NOTE}", _help()]
    parts += [f"## holdfast {name}\n\n{_help(name)}" for name in COMMANDS]
    return "\n".join(parts)


def _help(*command: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("DYN_")}
    done = subprocess.run(
        [sys.executable, "-m", "holdfast", *command, "--help"],
        env={**env, "COLUMNS": "100", "TERM": "dumb"},
        capture_output=True,
        text=True,
        check=True,
    )
    return f"```text\n{done.stdout.replace('python -m holdfast', 'holdfast').strip()}\n```\n"


def errors_page() -> str:
    """Return the error tree: code, HTTP status, whose fault, what may be done."""
    intro = (
        "`fault` says whose it is, `retry` what may be done: `never`, `elsewhere` (another worker), `later`. Only "
        "`worker` and `transport` faults count against a worker. The code stands in `error.code` of every answer.\n"
    )
    head = "| code | HTTP | fault | retry | when | what to do |\n|---|---|---|---|---|---|"
    lines = [f"# Errors\n\n{NOTE}", intro, head]
    for depth, error in _tree(HoldfastError):
        if error.__module__ == HoldfastError.__module__:
            when = (error.__doc__ or "").strip().splitlines()[0]
            facts = [f"{'· ' * depth}`{error.code}`", str(error.status), error.fault, error.retry, when, error.hint]
            lines.append(f"| {' | '.join(facts)} |")
    return "\n".join(lines) + "\n"


def _tree(error: type[HoldfastError], depth: int = 0) -> list[tuple[int, type[HoldfastError]]]:
    found = [(depth, error)]
    for child in error.__subclasses__():
        found += _tree(child, depth + 1)
    return found


def states_page() -> str:
    """Return the state diagrams."""
    stream = (
        "From the table in `requests/states.py`. `placing` is the first search for a worker, `migrating` every later "
        "one; `rejected` is the answer to a stream that no worker ever accepted."
    )
    worker = "From the table in `runtime/member.py`; an arrow's label is what was seen on the data path."
    leaving = (
        "From the table in `runtime/shutdown.py`. One deadline for all of it; a stage ends at its own bound, or when "
        "later stages need what is left. What the exit code says: [exit codes](exit-codes.md)."
    )
    return (
        f"# State machines\n\n{NOTE}\n## A stream\n\n{stream}\n\n```mermaid\n{states.diagram()}\n```\n\n"
        f"## A worker as a frontend sees it\n\n{worker}\n\n```mermaid\n{_worker_diagram()}\n```\n\n"
        f"## A worker that leaves\n\n{leaving}\n\n```mermaid\n{shutdown.diagram()}\n```\n"
    )


def _worker_diagram() -> str:
    lines = ["stateDiagram-v2", "    [*] --> unknown"]
    lines += [f"    {state} --> {following}: {trigger}" for (state, trigger), following in TRANSITIONS.items()]
    return "\n".join(lines)


def metric_tables() -> str:
    """Return every metric, by section."""
    intro = (
        "A frontend serves its metrics at `/metrics` of its HTTP port, a worker at `/metrics` of its status port. "
        "Labels from outside are bounded: a model that is not served counts as `unknown`. Gauges of what is in flight, "
        "waiting or leased are zero at rest. Counters whose labels can be known beforehand begin at 0, so that the "
        "first event is an increase.\n\n"
        "What is not here is not measured: the reference's metrics of its KV-aware router "
        "(`dynamo_component_router_*`, `dynamo_router_overhead_*`) come with a router that knows prefixes, those of "
        "its tokenizer cache and per-token detokenizing (`tokenizer_cache_*`, `detokenize_*`) have no counterpart "
        "here.\n"
    )
    return f"# Metrics\n\n{NOTE}\n{intro}\n{metrics_page()}"


PAGES = {
    "settings.md": settings_page,
    "cli.md": cli_page,
    "errors.md": errors_page,
    "states.md": states_page,
    "metrics.md": metric_tables,
}


def main(check: bool) -> int:
    """Write the pages, or name those that are out of date."""
    stale = []
    for name, make in PAGES.items():
        path, text = REFERENCE / name, make()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                REFERENCE.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    print(f"{'out of date' if check else 'written'}: {', '.join(stale) or 'none'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
