"""Stand-in; see the README beside this package."""

from tensorrt_llm.llmapi import LLM, SamplingParams

__version__ = "1.3.0rc29"
__all__ = ["LLM", "SamplingParams", "__version__"]
