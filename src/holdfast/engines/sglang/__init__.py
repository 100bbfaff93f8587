"""SGLang behind the engine contract: token ids in and out of its tokenizer manager, in this process.

Importing this package must never import SGLang; `SglangEngine.start` does.
"""

from holdfast.engines.sglang.config import SglangConfig
from holdfast.engines.sglang.engine import SglangEngine

__all__ = ["SglangConfig", "SglangEngine"]
