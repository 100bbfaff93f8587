"""What the documentation says exists, exists: links, settings, commands, flags, codes, metrics, files, and Python.

The generated pages of docs/reference are held to the code by `test_reference`; here they count as truth about flags.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.cli.catalogue import known_variables
from holdfast.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
GENERATED = "<!-- Written by `make docs`"
WRITTEN = [page for page in PAGES if GENERATED not in page.read_text(encoding="utf-8")]
SOURCE = "\n".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "src").rglob("*.py")))
GENERATED_TEXT = "\n".join(p.read_text(encoding="utf-8") for p in PAGES if p not in WRITTEN)

VARIABLES_ALLOWED = {
    "DYN_MIGRATON_LIMIT": "a typing error on purpose: the example of the warning about them",
    "DYN_": "stands for all of them, as DYN_*",
}
FLAGS_ALLOWED = {
    "--help": "of every command",
    "--no-deps": "pip's",
    "--name": "stands for any switch",
    "--no-name": "stands for any switch, switched off",
    "--flag": "stands for any flag",
}
_OF_ENGINES = (
    *("--dtype", "--enforce-eager", "--block-size", "--max-model-len", "--max-num-seqs", "--tensor-parallel-size"),
    *("--data-parallel-size", "--enable-lora", "--enable-sleep-mode", "--kv-events-config", "--kv-transfer-config"),
    *("--page-size", "--tp", "--context-length", "--dp-size", "--skip-tokenizer-init", "--enable-memory-saver"),
    *("--max-lora-rank", "--lora-target-modules", "--enable-deterministic-inference"),
    "--disaggregation-transfer-backend",
)
FLAGS_ALLOWED |= dict.fromkeys(_OF_ENGINES, "an engine's own, which the worker passes on")
WORDS_ALLOWED = {"extra_body": "of the openai package", "model_extra": "of the openai package"}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield (language, content) of each fenced block."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield match.group(1), match.group(2)


def prose(text: str) -> str:
    """Return the text without fenced blocks."""
    return re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def inline(text: str) -> list[str]:
    """Return what stands between backticks outside of blocks."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def shell(text: str) -> list[str]:
    """Return shell lines: of sh blocks (continuations joined), and inline code."""
    lines = [line for language, block in blocks(text) if language in ("sh", "shell", "bash") for line in _joined(block)]
    return [*lines, *inline(text)]


def _joined(block: str) -> list[str]:
    return [line.split(" # ")[0] for line in block.replace("\\\n", " ").splitlines()]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", prose(text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def flags_by_command() -> dict[str, set[str]]:
    """Return the flags of each command, as its help page lists them."""
    page = text_of(DOCS / "reference" / "cli.md")
    parts = re.split(r"^## holdfast (\w+)$", page, flags=re.MULTILINE)
    found = {parts[i]: re.findall(r"--(\[no-\])?([a-z][a-z0-9-]*)", parts[i + 1]) for i in range(1, len(parts), 2)}
    return {
        command: {f"--{flag}" for _, flag in flags} | {f"--no-{flag}" for switch, flag in flags if switch}
        for command, flags in found.items()
    }


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text_of(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists():
            broken.append(target)
        elif anchor and there.suffix == ".md" and anchor not in anchors(there):
            broken.append(f"{target} (no such heading)")
    assert broken == []


def test_every_page_is_reachable_from_the_index() -> None:
    reached, waiting = set(), [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = re.findall(r"\]\(([^)#\s]+\.md)[^)]*\)", prose(text_of(page)))
        waiting += [p for t in targets if (p := (page.parent / t).resolve()).exists()]
    assert sorted(name(p) for p in set(DOCS.rglob("*.md")) - reached) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_variables_exist(page: Path) -> None:
    mentioned = set(re.findall(r"\bDYN_[A-Z0-9_]*", text_of(page)))
    assert sorted(mentioned - set(known_variables()) - set(VARIABLES_ALLOWED)) == []


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_commands_and_their_flags_exist(page: Path) -> None:
    known, wrong = flags_by_command(), []
    everything = set().union(*known.values()) | set(FLAGS_ALLOWED)
    for line in shell(text_of(page)):
        for command, rest in re.findall(r"(?<![\w/.-])(?:\.venv/bin/)?holdfast +([a-z]\w*)([^|;&]*)", line):
            if command not in COMMANDS:
                wrong.append(f"holdfast {command}")
                continue
            flags = set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", rest))
            wrong += [f"holdfast {command} {flag}" for flag in flags - known[command] - set(FLAGS_ALLOWED)]
    for word in inline(text_of(page)):
        if re.match(r"--[a-z][a-z0-9-]*", word):
            flag = re.split(r"[ =]", word)[0]
            wrong += [] if flag in everything else [flag]
    assert wrong == []


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", text_of(ROOT / "Makefile"), re.MULTILINE))
    mentioned = {m for line in shell(text_of(page)) for m in re.findall(r"^(?:\S+=\S+ )*make +([a-z-]+)", line.strip())}
    assert sorted(mentioned - targets) == []


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_error_codes_exist(page: Path) -> None:
    text = text_of(page)
    codes = {*re.findall(r'^\s+code = "(\w+)"', SOURCE, re.MULTILINE), "internal"}
    marks = r'"code": ?"(\w+)"', r'"cause": ?"(\w+)"', r'error_type="(\w+)"', r'\bcode="(\w+)"'
    mentioned = {code for mark in marks for code in re.findall(mark, text)}
    assert sorted(mentioned - codes) == []


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_names_in_backticks_are_names_in_the_code(page: Path) -> None:
    """Codes, fields, metrics and functions are written with underscores; each is a word of the code."""
    form = re.compile(r"([a-z]+(?:_[a-z0-9]+)+)(\{[^}]*\}|\(.*\))?")
    words = {match.group(1) for word in inline(text_of(page)) if (match := form.fullmatch(word))}
    code = SOURCE + GENERATED_TEXT
    assert sorted(w for w in words - set(WORDS_ALLOWED) if not re.search(rf"\b{w}\b", code)) == []


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_files_and_tests_exist(page: Path) -> None:
    missing = []
    for word in inline(text_of(page)):
        if not re.fullmatch(r"[\w.-]+(/[\w.<>-]+)+/?", word) or "<" in word or not re.search(r"\.\w+$", word):
            continue
        tail = word.removeprefix(".venv/bin/")
        if tail == word and not any((base / word).exists() for base in (ROOT, ROOT / "src" / "holdfast", DOCS)):
            missing.append(word)
    assert missing == []


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_python_compiles(page: Path) -> None:
    for language, block in blocks(text_of(page)):
        if language == "python":
            compile(block, name(page), "exec")


def test_the_example_in_the_tutorial_is_the_example() -> None:
    example = text_of(ROOT / "examples" / "own_worker.py")
    shown = [b for language, b in blocks(text_of(DOCS / "tutorial" / "your-own-worker.md")) if language == "python"]
    assert any(block.strip() in example for block in shown)
