"""Weight files that hold nothing but zeros, for tests that read headers only."""

import json
import struct


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
