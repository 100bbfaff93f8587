"""Compiles Holdfast's C modules with whatever C compiler there is; needs nothing but Python's own headers.

``python tools/kernel.py`` puts them beside the sources, for a checkout that is used in place. The build hook
(`hatch_build.py`) uses `compile_kernel` for wheels and editable installs. Without a compiler or headers nothing is
built and nothing fails: the Python implementation runs instead (``HOLDFAST_KERNEL=require`` makes that an error,
``HOLDFAST_KERNEL=skip`` does not even try).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Kernel(NamedTuple):
    """One C module."""

    room: str
    """Package below ``holdfast`` that it belongs to; the sources are in its ``native/``."""
    source: str
    """File that includes the others."""
    module: str

    @property
    def sources(self) -> Path:
        """Return where the sources are."""
        return ROOT / "src" / "holdfast" / self.room / "native"

    @property
    def file(self) -> str:
        """Return the file name of the compiled module."""
        return f"{self.module}.abi3.so"

    @property
    def beside(self) -> Path:
        """Return where it is imported from in a checkout."""
        return ROOT / "src" / "holdfast" / self.room / self.file


KV = Kernel("kv", "kernel.c", "_kernel")
EXPRESS = Kernel("requests", "express.c", "_express")
KERNELS = (KV, EXPRESS)
FLAGS = ["-std=gnu11", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
LINK = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
SANITIZERS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


class CannotBuild(Exception):
    """The kernel could not be compiled; the message says why."""


def digest(kernel: Kernel) -> str:
    """Return what tells one version of the sources from another."""
    sources = sorted(kernel.sources.glob("*.[ch]"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


def compiler() -> str:
    """Return the path of the C compiler: ``CC``, then cc, gcc, clang."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise CannotBuild("no C compiler found (CC, cc, gcc, clang)")


def compile_kernel(kernel: Kernel, into: Path, extra: tuple[str, ...] = ()) -> None:
    """Compile to the file `into`, which is replaced at once: a process that has the old one mapped keeps it.

    Raises:
        CannotBuild: no compiler, no headers, or an error from the compiler.
    """
    if sys.platform == "win32":
        raise CannotBuild("the kernel is not built on Windows")
    into.parent.mkdir(parents=True, exist_ok=True)
    fresh = into.with_name(f".{into.name}.{os.getpid()}")
    headers = [f"-I{sysconfig.get_path(name)}" for name in ("include", "platinclude")]
    names = ["-fvisibility=default"] if extra else []
    command = [compiler(), *FLAGS, *names, *extra, f'-DSOURCE_DIGEST="{digest(kernel)}"', *headers, *LINK]
    try:
        done = subprocess.run(
            [*command, str(kernel.sources / kernel.source), "-o", str(fresh)],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise CannotBuild(f"{command[0]} failed:\n{done.stderr.strip()[:2000]}")
        fresh.replace(into)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(f"{command[0]}: {error}") from error
    finally:
        fresh.unlink(missing_ok=True)


def build(kernel: Kernel, into: Path) -> bool:
    """Compile as the environment variable ``HOLDFAST_KERNEL`` wants it and return whether there is a module now.

    An older one is not left in its place: it would be of other sources.
    """
    wanted = os.environ.get("HOLDFAST_KERNEL", "")
    if wanted == "skip":
        into.unlink(missing_ok=True)
        return False
    try:
        compile_kernel(kernel, into)
    except CannotBuild as error:
        if wanted == "require":
            raise
        into.unlink(missing_ok=True)
        print(f"holdfast: no compiled {kernel.module}, the Python implementation will run: {error}", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    built = [build(kernel, kernel.beside) for kernel in KERNELS]
    sys.exit(0 if all(built) else 1)
