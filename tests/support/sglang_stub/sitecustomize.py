"""NIXL in host memory: SGLang calls the memory of its KV cache "VRAM", whatever it is. Python loads this at start.

In processes that have this directory on ``PYTHONPATH``, and only there, that word means host memory to NIXL.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

NAMES = ("nixl_cu12._api", "nixl_cu13._api")


class _Patched(Loader):
    def __init__(self, loader: Loader):
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        agent: Any = module.nixl_agent
        begin = agent.__init__

        def begin_in_host_memory(self: Any, *arguments: Any, **named: Any) -> None:
            begin(self, *arguments, **named)
            self.nixl_mems = {**self.nixl_mems, "VRAM": self.nixl_mems["DRAM"], "cuda": self.nixl_mems["DRAM"]}

        agent.__init__ = begin_in_host_memory


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in NAMES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Patched(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
