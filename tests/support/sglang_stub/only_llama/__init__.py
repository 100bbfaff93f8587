"""The one model family of the tests: with ``SGLANG_EXTERNAL_MODEL_PACKAGE`` SGLang loads it, and 200 others not."""
