"""Runs the tests of ``holdfast.kv`` with a kernel that checks every access: AddressSanitizer and UBSan.

``python tools/sanitize.py [pytest arguments]``. Builds into a temporary directory, starts a second Python with the
sanitizer's library loaded first, and puts that kernel in the place of the usual one. Ends with 0 and a sentence where
there is no compiler or no sanitizer.
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

NAME = "holdfast.kv._kernel"
TIMEOUT = 300
TESTS = ["tests/kv", "-q", "--capture=sys", "-p", "no:cacheprovider", "-k", "kernel and not approximate"]


def inside(library: str, arguments: list[str]) -> int:
    """Run the tests with the kernel from this file."""
    import pytest  # noqa: PLC0415 - only in the second process

    loader = importlib.machinery.ExtensionFileLoader(NAME, library)
    spec = importlib.util.spec_from_file_location(NAME, library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[NAME] = module
    import holdfast.kv  # noqa: PLC0415

    setattr(holdfast.kv, NAME.rpartition(".")[2], module)
    from holdfast.kv.choice import implementation  # noqa: PLC0415

    assert implementation() == "kernel"
    return int(pytest.main([*TESTS, *arguments]))


def main() -> int:
    """Build and start the second process."""
    with tempfile.TemporaryDirectory(prefix="holdfast-sanitize-") as scratch:
        library = Path(scratch) / kernel.FILE
        try:
            kernel.compile_kernel(library, tuple(kernel.SANITIZERS))
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
        command = [sys.executable, __file__, "--inside", str(library), *sys.argv[1:]]
        return subprocess.run(command, env=environment, timeout=TIMEOUT, check=False).returncode


if __name__ == "__main__":
    sys.exit(inside(sys.argv[2], sys.argv[3:]) if sys.argv[1:2] == ["--inside"] else main())
