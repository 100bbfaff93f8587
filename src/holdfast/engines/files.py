"""From a model's files to what an engine tells its worker about them.

Must never know a particular engine.
"""

from __future__ import annotations

from pathlib import Path

from holdfast.engines.contract import ModelFiles
from holdfast.models.hf import read_text_files
from holdfast.models.text_files import TextFiles


def model_files(text: TextFiles) -> ModelFiles:
    """Return the files of `models.hf` or `models.gguf` as they stand in `EngineInfo`."""
    return ModelFiles(
        tokenizer_json=text.tokenizer_json,
        chat_template=text.chat_template,
        bos_token=text.bos_token,
        eos_token=text.eos_token,
        generation_config=text.generation_config,
    )


def model_files_from_directory(path: Path) -> ModelFiles:
    """Return the files of a Hugging Face directory. Raises InvalidRequest or UnsupportedFeature (`models.hf`)."""
    return model_files(read_text_files(path))
