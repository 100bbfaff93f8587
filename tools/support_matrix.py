"""Writes docs/reference/support-matrix.md from the records of the conformance suite in docs/reference/support.

``python tools/support_matrix.py`` writes the page, ``--check`` only says whether it is up to date. A record comes, in
that engine's environment, from ``python -m pytest tests/engines/conformance/test_conformance.py --engine NAME --record
docs/reference/support``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "docs" / "reference" / "support"
PAGE = ROOT / "docs" / "reference" / "support-matrix.md"
NOTE = "<!-- Written by tools/support_matrix.py from the records in support/; do not change this page. -->\n"
ORDER = ("llamacpp", "vllm", "sglang", "trtllm", "mock")
NAMES = {"llamacpp": "llama.cpp", "vllm": "vLLM", "sglang": "SGLang", "trtllm": "TensorRT-LLM", "mock": "mock"}
MARKS = {"passed": "yes", "failed": "**no**", "not applicable": "-"}
NEVER = "never"
STREAMS = 64
"""As the check's sentence says."""
NO_GPU = (
    "**{gpu}** {names} ran for real, with real weights, on a CPU; what a GPU changes "
    "(other kernels, CUDA graphs, bf16, several devices, RDMA transfers) is {covered}."
)
NO_TRTLLM = (
    "**TensorRT-LLM itself has never run with Holdfast, on no hardware.** Its adapter ran against a stand-in that "
    "implements the called part of its API; the signatures that it calls were compared with those that the package's "
    "source and reference state. What the stand-in does is what that source says, not what was seen. Its capabilities "
    "are claimed accordingly low: no exactness of continuations is promised."
)


def load_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records, in the page's order of engines."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda record: (_place(record["engine"]), record["engine"], record.get("device", "")))


def _name(record: dict[str, Any]) -> str:
    name = NAMES.get(record["engine"], record["engine"])
    return f"{name} on {record['device']}" if record.get("device") else name


def _place(engine: str) -> int:
    return ORDER.index(engine) if engine in ORDER else len(ORDER)


def page(records: list[dict[str, Any]], sentences: dict[str, str]) -> str:
    """Return the page.

    Args:
        records: as `load_records` returns them.
        sentences: what each check is about, by name, in order.
    """
    names = [_name(record) for record in records]
    missing = [NAMES[engine] for engine in ORDER if engine not in {record["engine"] for record in records}]
    real = [name for record, name in zip(records, names, strict=True) if record["where"].startswith("CPU")]
    on_gpu = [name for record, name in zip(records, names, strict=True) if record.get("device")]
    gpu = (
        f"Of all engines only this ran on a GPU: {', '.join(on_gpu)}."
        if on_gpu
        else "Nothing on this page ran on a GPU."
    )
    covered = "covered by that alone, as far as its record says" if on_gpu else "not covered"
    unproven = f"* {NO_GPU.format(gpu=gpu, covered=covered, names=', '.join(real) or 'No engine')}\n* {NO_TRTLLM}\n"
    parts = [f"# Support matrix\n\n{NOTE}", _intro(), unproven]
    if missing:
        parts.append(f"No record is committed for: {', '.join(missing)}.\n")
    parts += ["## What ran, and where\n", _runs(records, names)]
    parts += ["## Exactness of a continuation\n", _exactness(records, names)]
    parts += ["## Check by check\n", _checks(records, names, sentences)]
    parts += ["## What engines can do\n", _capabilities(records, names)]
    return "\n".join(parts)


def _intro() -> str:
    return (
        "Every engine is held to one contract by one suite of checks "
        "([tests/engines/conformance](../../tests/engines/conformance)). This page shows what the suite found when it "
        "last ran with each of them; the records are in [support/](support/). `holdfast doctor engines` compares an "
        "installation with the versions below.\n"
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _runs(records: list[dict[str, Any]], names: list[str]) -> str:
    rows = []
    for record, name in zip(records, names, strict=True):
        version = f"{record['version']} (of the stand-in)" if record["stand_in"] else record["version"]
        passed = sum(result["verdict"] == "passed" for result in record["checks"].values())
        failed = sum(result["verdict"] == "failed" for result in record["checks"].values())
        cpu = "CPU" if record["where"].startswith("CPU") else "none needed"
        hardware = NEVER if record["stand_in"] else record.get("device") or cpu
        packages = ", ".join(f"{package} {number}" for package, number in record["packages"].items() if number)
        verdict = f"{passed} passed, {failed} failed" + ("" if record["complete"] else " (incomplete)")
        rows.append([name, version, record["where"], hardware, packages or "-", record["date"], verdict])
    return _table(["engine", "version", "what ran", "the engine itself on", "with", "date", "checks"], rows)


def _exactness(records: list[dict[str, Any]], names: list[str]) -> str:
    text = (
        "Claimed is what workers tell frontends; measured is what the suite saw when it resumed from prompt and "
        "generated ids. Claiming more than was measured fails the suite. What a continuation starts anew is excepted "
        "in the capabilities.\n"
    )
    rows = []
    for record, name in zip(records, names, strict=True):
        found = record["checks"].get("exactness", {}).get("measured", {})
        measured = f"{found.get('measured', '-')}" + (" (of the stand-in)" if record["stand_in"] else "")
        excepted = ", ".join(record["capabilities"].get("not_restored", [])) or "nothing"
        rows.append([
            name, record["capabilities"].get("continuation", "-"), measured, found.get("greedy", "-"),
            found.get("seeded", "-"), excepted,
        ])  # fmt: skip
    head = ["engine", "claimed", "measured", "greedy continued equally", "seeded continued equally", "begins anew"]
    return text + "\n" + _table(head, rows)


def _checks(records: list[dict[str, Any]], names: list[str], sentences: dict[str, str]) -> str:
    rows, reasons = [], []
    for check, sentence in sentences.items():
        cells = []
        for record, name in zip(records, names, strict=True):
            result = record["checks"].get(check)
            cells.append("?" if result is None else _mark(result))
            if result is not None and result.get("reason"):
                reasons.append(f"* {name}, {check}: {result['reason']}.")
        rows.append([sentence, *cells])
    legend = "yes: passed; -: the engine does not claim it; **no**: failed; ?: not in its record.\n"
    return legend + "\n" + _table(["check", *names], rows) + "\n" + "\n".join(reasons) + ("\n" if reasons else "")


def _mark(result: dict[str, Any]) -> str:
    """Return the verdict, with the number of streams where fewer were tried than the check's name says."""
    streams = result.get("measured", {}).get("streams", STREAMS)
    return MARKS[result["verdict"]] + (f" ({streams})" if streams != STREAMS else "")


def _capabilities(records: list[dict[str, Any]], names: list[str]) -> str:
    shown = (
        "max_logprobs", "guided", "logit_bias", "penalties", "prefix_cache", "kv_events", "kv_hashes", "handoff",
        "cancel_until", "lora",
    )  # fmt: skip
    rows = [[f"`{field}`", *(_value(record["capabilities"].get(field)) for record in records)] for field in shown]
    text = "As configured for the suite; `handoff` and `lora` depend on how a worker is started.\n"
    return text + "\n" + _table(["capability", *names], rows)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "-"
    if isinstance(value, list):
        return ", ".join(value) or "-"
    return "-" if value in ("", None) else str(value)


def sentences() -> dict[str, str]:
    """Return what each check is about."""
    sys.path.insert(0, str(ROOT))
    from tests.engines.conformance.checks import CHECKS  # noqa: PLC0415

    return {check.name: check.sentence for check in CHECKS}


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    wanted = parser.parse_args()
    text = page(load_records(RECORDS), sentences())
    if wanted.check:
        current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
        if current != text:
            sys.stderr.write(
                "docs/reference/support-matrix.md is not what its records say: run tools/support_matrix.py\n"
            )
        return int(current != text)
    PAGE.write_text(text, encoding="utf-8")
    sys.stdout.write(f"written: {PAGE.relative_to(ROOT)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
