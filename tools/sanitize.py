"""Runs the tests of the C modules with builds that check every access: AddressSanitizer and UBSan.

``python tools/sanitize.py [pytest arguments]``. Builds into a temporary directory, starts a second Python with the
sanitizer's library loaded first, and puts those modules in the place of the usual ones. Ends with 0 and a sentence
where there is no compiler or no sanitizer.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import kernel

TIMEOUT = 300
TESTS = ["tests/kv", "tests/frontend/test_tracks.py", "-q", "--capture=sys", "-p", "no:cacheprovider"]
TESTS += ["-k", "(kernel or tracks) and not approximate"]


def install(which: kernel.Kernel, library: str) -> None:
    """Put a compiled module in the place of the usual one."""
    name = f"holdfast.{which.room}.{which.module}"
    loader = importlib.machinery.ExtensionFileLoader(name, library)
    spec = importlib.util.spec_from_file_location(name, library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[name] = module
    setattr(importlib.import_module(f"holdfast.{which.room}"), which.module, module)


def inside(folder: str, arguments: list[str]) -> int:
    """Run the tests with the modules from this folder."""
    import pytest  # noqa: PLC0415 - only in the second process

    for which in kernel.KERNELS:
        install(which, str(Path(folder) / which.file))
    from holdfast.kv.choice import implementation  # noqa: PLC0415
    from holdfast.requests import express  # noqa: PLC0415

    assert implementation() == "kernel"
    assert express.native is sys.modules["holdfast.requests._express"]
    return int(pytest.main([*TESTS, *arguments]))


def main() -> int:
    """Build and start the second process."""
    with tempfile.TemporaryDirectory(prefix="holdfast-sanitize-") as scratch:
        try:
            for which in kernel.KERNELS:
                kernel.compile_kernel(which, Path(scratch) / which.file, tuple(kernel.SANITIZERS))
        except kernel.CannotBuild as error:
            print(f"sanitize: nothing was checked: {error}")
            return 0
        preload = subprocess.run(
            [kernel.compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, timeout=30, check=True
        ).stdout.strip()
        environment = {
            **os.environ,
            "LD_PRELOAD": preload,
            "PYTHONMALLOC": "malloc",
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        }
        command = [sys.executable, __file__, "--inside", scratch, *sys.argv[1:]]
        return subprocess.run(command, env=environment, timeout=TIMEOUT, check=False).returncode


if __name__ == "__main__":
    sys.exit(inside(sys.argv[2], sys.argv[3:]) if sys.argv[1:2] == ["--inside"] else main())
