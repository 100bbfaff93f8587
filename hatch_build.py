"""Build hook: puts the compiled modules (`tools/kernel.py`) into the package where there is a C compiler.

With them the wheel is one for Python 3.11 and later on this platform (stable ABI); without it, a pure Python one.
"""

from __future__ import annotations

import importlib.util
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def kernel_tool(root: str) -> Any:
    """Return the module tools/kernel.py."""
    spec = importlib.util.spec_from_file_location("holdfast_kernel_build", Path(root) / "tools" / "kernel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class KernelBuildHook(BuildHookInterface):
    """Compiles beside the sources for an editable install, into the wheel otherwise."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and tell the builder what to take."""
        tool = kernel_tool(self.root)
        if version == "editable":
            for kernel in tool.KERNELS:
                tool.build(kernel, kernel.beside)
            return
        self.scratch = tempfile.TemporaryDirectory(prefix="holdfast-kernel-")
        for kernel in tool.KERNELS:
            built = Path(self.scratch.name) / kernel.file
            if tool.build(kernel, built):
                platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
                build_data["pure_python"] = False
                build_data["tag"] = f"cp311-abi3-{platform}"
                build_data["force_include"][str(built)] = f"holdfast/{kernel.room}/{kernel.file}"

    def finalize(self, _version: str, _build_data: dict[str, Any], _artifact: str) -> None:
        """Remove what was compiled for the wheel."""
        scratch = getattr(self, "scratch", None)
        if scratch is not None:
            scratch.cleanup()
