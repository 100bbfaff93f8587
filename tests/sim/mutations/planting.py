"""Plants a bug into production code that is loaded already, and takes it out again.

A bug is given as a piece of source text and what stands in its place, so that it reads as a diff and fails loudly when
the code has moved on. The changed module is compiled, and every function that differs gets the new code object in
place of its own: whoever holds the function, by whatever name, runs the bug. Only the bodies of functions can be
changed like this; anything else is refused.

Must never leave a bug behind: `planted` restores the code objects even when the universe raises.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Generator, Iterator, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any

import msgspec


class Edit(msgspec.Struct, frozen=True):
    """One change to one module's source."""

    module: str
    """Without ``holdfast.``."""
    old: str
    """Must occur exactly once."""
    new: str


def change(module: str, diff: str) -> Edit:
    """Return the change that a diff describes: lines that begin with ``-`` become those with ``+``; others stay."""
    lines = diff.strip("\n").splitlines(keepends=True)
    lines[-1] = lines[-1].rstrip("\n") + "\n"
    old = "".join(line[1:] or "\n" for line in lines if not line.startswith("+"))
    new = "".join(line[1:] or "\n" for line in lines if not line.startswith("-"))
    return Edit(module, old, new)


class Moved(AssertionError):
    """The code that a bug is planted into is not there any more, or not as it was: write the bug anew."""


@contextlib.contextmanager
def planted(edits: Sequence[Edit]) -> Generator[None, None, None]:
    """Run a block with all of these changes in force."""
    before: list[tuple[FunctionType, CodeType]] = []
    try:
        for function, code in replacements(edits):
            before.append((function, function.__code__))
            function.__code__ = code
        yield
    finally:
        for function, code in reversed(before):
            function.__code__ = code


def replacements(edits: Sequence[Edit]) -> list[tuple[FunctionType, CodeType]]:
    """Return the functions that these changes touch, each with its new code.

    Raises:
        Moved: a piece of source is not there exactly once, or the change is not one of a function's body.
    """
    found: list[tuple[FunctionType, CodeType]] = []
    for name in dict.fromkeys(edit.module for edit in edits):
        module = importlib.import_module(f"holdfast.{name}")
        found += _changed(module, [edit for edit in edits if edit.module == name])
    return found


def _changed(module: ModuleType, edits: list[Edit]) -> list[tuple[FunctionType, CodeType]]:
    source = inspect.getsource(module)
    mutated = source
    for edit in edits:
        count = mutated.count(edit.old)
        if count != 1:
            raise Moved(f"in {edit.module} this is there {count} times, not once:\n{edit.old}")
        mutated = mutated.replace(edit.old, edit.new)
    path = module.__file__ or module.__name__
    before = dict(_functions(compile(source, path, "exec", dont_inherit=True)))
    after = dict(_functions(compile(mutated, path, "exec", dont_inherit=True)))
    if before.keys() != after.keys():
        raise Moved(
            f"a bug in {module.__name__} may not add or remove functions: {sorted(before.keys() ^ after.keys())}"
        )
    changed = [(_live(module, name), code) for name, code in after.items() if _meaning(code) != _meaning(before[name])]
    if not changed:
        raise Moved(f"a bug in {module.__name__} changes no function's body")
    return changed


def _functions(code: CodeType) -> Iterator[tuple[str, CodeType]]:
    """Yield the functions of a module and of its classes, not those inside functions, by qualified name."""
    for constant in code.co_consts:
        if not isinstance(constant, CodeType):
            continue
        if constant.co_flags & inspect.CO_OPTIMIZED:
            yield _name(constant), constant
        else:
            yield from _functions(constant)


def _name(code: CodeType) -> str:
    return code.co_qualname if sys.version_info >= (3, 11) else code.co_name


def _meaning(code: CodeType) -> tuple[Any, ...]:
    """Return what a code object does, without the lines on which it says so."""
    constants = tuple(_meaning(c) if isinstance(c, CodeType) else (type(c), c) for c in code.co_consts)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return code.co_code, constants, names, code.co_flags, code.co_exceptiontable


def _live(module: ModuleType, name: str) -> FunctionType:
    """Return the loaded function of that qualified name."""
    owner: Any = module
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    found = inspect.unwrap(_bare(vars(owner)[last]), stop=lambda f: not hasattr(f, "__wrapped__"))
    if not isinstance(found, FunctionType) or found.__qualname__ != name:
        raise Moved(f"{module.__name__}.{name} is no plain function: {found!r}")
    return found


def _bare(found: Any) -> Any:
    if isinstance(found, property):
        return found.fget
    if isinstance(found, functools.cached_property):
        return found.func
    return found.__func__ if isinstance(found, staticmethod | classmethod) else found
