"""A TensorRT-LLM engine on the stand-in, with a model directory that has everything but weights."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from holdfast.engines.contract import EngineInfo, LoadProgress
from holdfast.engines.mock.vocabulary import vocabulary
from holdfast.engines.trtllm import TrtllmConfig, TrtllmEngine
from tests.support.tensorrt_llm_standin import installed
from tests.support.weights import safetensors

CONTEXT = 512
BLOCK = 16
_made: list[tempfile.TemporaryDirectory[str]] = []


def model_directory() -> Path:
    """Return a directory that the adapter takes for a model; made once."""
    if not _made:
        _made.append(tempfile.TemporaryDirectory(prefix="holdfast-trtllm-"))
        known, place = vocabulary(), Path(_made[0].name)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": CONTEXT,
            "vocab_size": known.size,
            "hidden_size": 16,
            "eos_token_id": list(known.eos_ids),
            "torch_dtype": "bfloat16",
        }
        (place / "config.json").write_text(json.dumps(config))
        (place / "tokenizer.json").write_bytes(known.files.tokenizer_json)
        (place / "tokenizer_config.json").write_text(json.dumps({"chat_template": known.files.chat_template}))
        (place / "model.safetensors").write_bytes(safetensors({"w": ("BF16", (4, 2))}))
    return Path(_made[0].name)


class OnStandIn(TrtllmEngine):
    """Finds the stand-in where the package would be; the classes stay, the import path does not."""

    async def boot(self, on_load: LoadProgress) -> EngineInfo:
        with installed():
            return await super().boot(on_load)


def engine(**settings: Any) -> OnStandIn:
    """Return an engine that has not been started; its KV cache has 1,024 tokens."""
    overrides = {"kv_cache_config": {"max_tokens": 1024}}
    return OnStandIn(
        TrtllmConfig(
            **{
                "model": str(model_directory()),
                "model_name": "tiny",
                "block_size": BLOCK,
                "max_num_seqs": 16,
                "override_engine_args": json.dumps(overrides),
                **settings,
            }
        )
    )
