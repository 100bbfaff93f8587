"""Stand-ins for binary modules that SGLang imports and, on a CPU, never calls.

SGLang 0.5.23 imports ``sgl_kernel`` (CUDA) and ``torchvision`` (its wheels on the index are CUDA builds too) while its
own modules are loaded. Put this directory on ``PYTHONPATH`` of a process that shall run SGLang without a GPU: both
then exist, every name in them is a class, and using one says at once which. Only tests do this.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Named(type):
    """Attributes of a stand-in class are stand-ins too (``InterpolationMode.BICUBIC`` in a default value)."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _thing(f"{cls.__qualname__}.{name}")


def _thing(name: str) -> Any:
    def refuse(self: object, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{name} is a stand-in and does nothing; what needs it cannot be tested here")

    body = {"__qualname__": name, "__init__": lambda *_, **__: None, "__call__": refuse}
    return _Named(name.rpartition(".")[2], (), body)


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _thing(f"{self.__name__}.{name}")


class _Finder(MetaPathFinder, Loader):
    """Finds every module below one package."""

    def __init__(self, package: str):
        self._prefix = package + "."

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.startswith(self._prefix) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _Module(spec.name)
        module.__path__ = []  # a package, so that its own submodules are looked for
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_in(package: str) -> None:
    """Turn a module that is being loaded into a package in which everything exists and nothing works."""
    module = sys.modules[package]
    module.__class__ = _Module
    module.__path__ = []
    module.__version__ = "0.0.0"  # type: ignore[attr-defined]
    sys.meta_path.insert(0, _Finder(package))
