"""The one model family of the tests: SGLang looks here first (``SGLANG_EXTERNAL_MODEL_PACKAGE``), and loads 200 less."""
