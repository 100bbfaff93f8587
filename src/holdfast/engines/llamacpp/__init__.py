"""The embedded engine: llama.cpp in this process, byte-exact continuation, no GPU needed.

Importing this package must never import numpy or an engine library; `LlamaCppEngine.start` does.
"""

from holdfast.engines.llamacpp.config import DEFAULT_MODEL, LlamaCppConfig
from holdfast.engines.llamacpp.engine import LlamaCppEngine

__all__ = ["DEFAULT_MODEL", "LlamaCppConfig", "LlamaCppEngine"]
