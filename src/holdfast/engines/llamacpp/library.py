"""The C functions of llama.cpp, bound with ctypes over a shared library that is already installed.

The PyPI wheel ``xllamacpp`` exports the whole C API from its extension module; ``llama_cpp_python`` ships a
``libllama``. The layout of ``llama_context_params`` moved between versions and no header travels with a wheel,
so the layout is recognised by its documented default values; anything unknown is refused rather than guessed.

Must never import numpy or the packages whose libraries it loads, and never decide how a model is run.
"""

from __future__ import annotations

import ctypes as c
import functools
import importlib.util
import logging
from collections import deque
from pathlib import Path
from typing import Any

from holdfast.base.errors import EngineFailed

logger = logging.getLogger(__name__)

INSTALL_HINT = "Install the embedded engine with: pip install 'holdfast[llamacpp]' (or set library_path)."

_PACKAGES = (
    ("xllamacpp", ("xllamacpp*.so", "xllamacpp*.pyd")),
    ("llama_cpp", ("lib/libllama.so", "lib/libllama.dylib", "lib/llama.dll")),
)

# Offsets in llama_context_params that are the same in every layout known here, with the default to expect.
_FIXED = {
    "n_ctx": (0, 512),
    "n_batch": (4, 2048),
    "n_ubatch": (8, 512),
    "n_seq_max": (12, 1),
    "n_threads": (28, 4),
    "n_threads_batch": (32, 4),
    "flash_attn_type": (52, -1),
    "type_k": (104, 1),
    "type_v": (108, 1),
}
_BOOLS = (False, True, True, True, True, False)
"""embeddings, offload_kqv, no_perf, op_offload, swa_full, kv_unified: a block of six bytes whose place moved."""
_BOOL_OFFSETS = (128, 136, 144)
_OFFLOAD_KQV, _OP_OFFLOAD, _KV_UNIFIED = 1, 3, 5

_GPU_LAYERS = 16
"""Offset of n_gpu_layers in llama_model_params."""
_GPU_LAYERS_DEFAULTS = (-1, 999)


class Params(c.Structure):
    """Room for a parameter struct of unknown size.

    On the supported platforms a struct of this size is passed and returned in memory, so a buffer larger
    than the real struct is harmless when it is the last argument.
    """

    _fields_ = (("raw", c.c_uint8 * 512),)


class Batch(c.Structure):
    """``llama_batch``."""

    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.c_void_p),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    )


class TokenDataArray(c.Structure):
    """``llama_token_data_array``; ``data`` points to (i32 id, f32 logit, f32 p) records."""

    _fields_ = (("data", c.c_void_p), ("size", c.c_size_t), ("selected", c.c_int64), ("sorted", c.c_bool))


_LOG_CALLBACK = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
_KEPT: list[Any] = []
"""Callbacks whose pointers the library holds for the life of the process."""
_P, _I, _B, _S = c.c_void_p, c.c_int32, c.c_bool, c.c_char_p

_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_version": (_S, ()),
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LOG_CALLBACK, _P)),
    "llama_model_default_params": (Params, ()),
    "llama_model_load_from_file": (_P, (_S, Params)),
    "llama_model_free": (None, (_P,)),
    "llama_model_n_ctx_train": (_I, (_P,)),
    "llama_model_get_vocab": (_P, (_P,)),
    "llama_context_default_params": (Params, ()),
    "llama_init_from_model": (_P, (_P, Params)),
    "llama_free": (None, (_P,)),
    "llama_n_ctx": (c.c_uint32, (_P,)),
    "llama_get_memory": (_P, (_P,)),
    "llama_vocab_n_tokens": (_I, (_P,)),
    "llama_vocab_is_eog": (_B, (_P, _I)),
    "llama_vocab_is_control": (_B, (_P, _I)),
    "llama_vocab_bos": (_I, (_P,)),
    "llama_tokenize": (_I, (_P, _S, _I, c.POINTER(_I), _I, _B, _B)),
    "llama_token_to_piece": (_I, (_P, _I, _S, _I, _I, _B)),
    "llama_decode": (_I, (_P, Batch)),
    "llama_get_logits_ith": (c.POINTER(c.c_float), (_P, _I)),
    "llama_memory_clear": (None, (_P, _B)),
    "llama_memory_seq_rm": (_B, (_P, _I, _I, _I)),
    "llama_memory_seq_cp": (None, (_P, _I, _I, _I, _I)),
    "llama_sampler_init_grammar": (_P, (_P, _S, _S)),
    "llama_sampler_accept": (None, (_P, _I)),
    "llama_sampler_apply": (None, (_P, c.POINTER(TokenDataArray))),
    "llama_sampler_free": (None, (_P,)),
}


def find_library(explicit: str | None = None) -> Path:
    """Return the shared library to load: the explicit path, else that of an installed package.

    Raises:
        EngineFailed: none is there, with the command that installs one.
    """
    if explicit is not None:
        path = Path(explicit)
        if path.is_file():
            return path
        raise EngineFailed(f"The llama.cpp library {explicit!r} does not exist; correct library_path.")
    for package, patterns in _PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for pattern in patterns:
                for path in sorted(Path(folder).glob(pattern)):
                    return path
    raise EngineFailed(f"No llama.cpp library is installed (looked for xllamacpp and llama_cpp). {INSTALL_HINT}")


@functools.cache
def load_library(path: Path) -> LlamaLibrary:
    """Return the library at ``path``, loaded once per process."""
    return LlamaLibrary(path)


class LlamaLibrary:
    """llama.cpp's C API; each function is an attribute without its ``llama_`` prefix."""

    def __init__(self, path: Path):
        """Load, bind and recognise. Raises EngineFailed when the library is not one this module knows."""
        self.path = path
        self.complaints: deque[str] = deque(maxlen=8)
        """The library's last warnings and errors; they explain a failed load."""
        try:
            self._dll = c.CDLL(str(path))
        except OSError as error:
            raise EngineFailed(f"Cannot load the llama.cpp library {path}: {error}. {INSTALL_HINT}") from error
        for name, (result, arguments) in _SIGNATURES.items():
            setattr(self, name.removeprefix("llama_"), self._bind(name, result, arguments))
        self.version: str = self._call("version").decode()
        self._bools = self._recognise()
        _KEPT.append(_LOG_CALLBACK(self._on_log))
        self._call("log_set", _KEPT[-1], None)
        self._call("backend_init")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"llama.cpp function llama_{name} is not bound; add it to _SIGNATURES.")

    def _call(self, name: str, *arguments: Any) -> Any:
        return getattr(self, name)(*arguments)

    def _bind(self, name: str, result: Any, arguments: tuple[Any, ...]) -> Any:
        try:
            function = getattr(self._dll, name)
        except AttributeError:
            raise EngineFailed(
                f"{self.path} has no function {name}: too old or not llama.cpp. {INSTALL_HINT}"
            ) from None
        function.restype = result
        function.argtypes = arguments
        return function

    def _recognise(self) -> int:
        """Return the offset of the block of booleans, or refuse the layout."""
        raw = bytes(self._call("context_default_params").raw)
        layers = _read(bytes(self._call("model_default_params").raw), _GPU_LAYERS)
        wrong = [f"n_gpu_layers is {layers}"] if layers not in _GPU_LAYERS_DEFAULTS else []
        wrong += [
            f"{name} is {_read(raw, offset)} instead of {expected}"
            for name, (offset, expected) in _FIXED.items()
            if _read(raw, offset) != expected
        ]
        found = [offset for offset in _BOOL_OFFSETS if raw[offset : offset + 6] == bytes(_BOOLS)]
        if wrong or not found:
            reason = "; ".join(wrong) or "the block of switches is not where a known version has it"
            raise EngineFailed(
                f"llama.cpp {self.version} at {self.path} has an unknown parameter layout ({reason}), and running it "
                "could corrupt memory. Install the pinned wheel: pip install 'holdfast[llamacpp]'."
            )
        return found[0]

    def model_params(self) -> Params:
        """Return model parameters: the defaults, everything on the CPU."""
        params: Params = self._call("model_default_params")
        params.raw[_GPU_LAYERS : _GPU_LAYERS + 4] = [0] * 4
        return params

    def context_params(self, *, unified: bool, **values: int) -> Params:
        """Return context parameters: the defaults with these fields (names as in ``_FIXED``) replaced.

        Everything stays on the CPU: exact continuation has been measured there, not on other devices.
        """
        params: Params = self._call("context_default_params")
        for name, value in values.items():
            offset = _FIXED[name][0]
            params.raw[offset : offset + 4] = list(value.to_bytes(4, "little", signed=True))
        params.raw[self._bools + _KV_UNIFIED] = int(unified)
        params.raw[self._bools + _OFFLOAD_KQV] = 0
        params.raw[self._bools + _OP_OFFLOAD] = 0
        return params

    def _on_log(self, level: int, text: bytes, _user: int | None) -> None:
        line = text.decode("utf-8", "replace").strip()
        if line and level in (3, 4):  # warning, error
            self.complaints.append(line)
            logger.debug("llama.cpp: %s", line)


def _read(raw: bytes, offset: int) -> int:
    return int.from_bytes(raw[offset : offset + 4], "little", signed=True)
