"""TensorRT-LLM behind the engine contract.

Written against its documented API and compared with its source's signatures (tests/engines/trtllm); it needs an NVIDIA
GPU, and docs/reference/support-matrix.md says on what it has run. Importing this loads nothing of it.
"""

from holdfast.engines.trtllm.config import TrtllmConfig
from holdfast.engines.trtllm.engine import TrtllmEngine

__all__ = ["TrtllmConfig", "TrtllmEngine"]
