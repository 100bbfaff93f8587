"""Weight files that hold nothing but zeros, for tests that read headers only."""

import json
import struct
from pathlib import Path


def safetensors(tensors):
    """Bytes of a safetensors file with zeros in it; tensors: {name: (dtype, shape)}."""
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = {"F32": 4, "BF16": 2}[dtype]
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(at)


def adapter_directory(path: Path, *, fill: int = 0, rank: int = 2, hidden: int = 4) -> Path:
    """Write a LoRA adapter whose weights are all one byte; returns its directory."""
    path.mkdir(parents=True)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {f"{name}.lora_A.weight": ("F32", (rank, hidden)), f"{name}.lora_B.weight": ("F32", (hidden, rank))}
    data = safetensors(shapes)
    size = 2 * 4 * rank * hidden
    (path / "adapter_model.safetensors").write_bytes(data[:-size] + bytes([fill]) * size)
    config = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": rank, "lora_alpha": rank}
    (path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    return path
