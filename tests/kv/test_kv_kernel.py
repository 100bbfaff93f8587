"""The compiled kernel: it is there when it should be, it is of these sources, and its XXH3 is the real one."""

from __future__ import annotations

import importlib.util
import random
from array import array
from pathlib import Path

import pytest
from xxhash import xxh3_64_intdigest

from holdfast.kv import hashes, kernel
from holdfast.kv.hashes import block_hashes, local_hashes, sequence_hashes

ROOT = Path(__file__).resolve().parent.parent.parent
needs_kernel = pytest.mark.skipif(kernel.native is None, reason=f"no kernel: {kernel.UNAVAILABLE}")


def build_tool():
    spec = importlib.util.spec_from_file_location("kernel_tool", ROOT / "tools" / "kernel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_where_there_is_a_compiler_there_is_a_kernel_of_these_sources(tmp_path):
    """Fails when native/ was changed, or a compiler installed, without installing again (`python tools/kernel.py`)."""
    tool = build_tool()
    try:
        tool.compile_kernel(tool.KV, tmp_path / tool.KV.file)
    except tool.CannotBuild as error:
        pytest.skip(f"cannot build here: {error}")
    assert kernel.UNAVAILABLE == ""
    assert tool.digest(tool.KV) == kernel.native.SOURCE_DIGEST


def test_without_a_compiler_nothing_is_built_and_nothing_fails(tmp_path, monkeypatch, capsys):
    tool = build_tool()
    monkeypatch.delenv("HOLDFAST_KERNEL", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tool.build(tool.KV, tmp_path / tool.KV.file) is False
    assert "no C compiler found" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("HOLDFAST_KERNEL", "require")
    with pytest.raises(tool.CannotBuild):
        tool.build(tool.KV, tmp_path / tool.KV.file)


@needs_kernel
def test_xxh3_of_every_length():
    rng = random.Random(1)
    for length in [*range(1, 1100), 2047, 2048, 2049, 5000, 65_536]:
        data, seed = rng.randbytes(length), rng.choice((0, 1337, rng.getrandbits(64)))
        assert array("Q", kernel.native.hash_pieces(data, length, length, seed))[0] == xxh3_64_intdigest(data, seed)


@needs_kernel
@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 5, 16, 32, 60, 61, 64, 128, 256])
@pytest.mark.parametrize("lookahead", [False, True])
def test_kernel_and_python_hash_alike(monkeypatch, block_size, lookahead):
    rng = random.Random(block_size)
    tokens = array("I", (rng.getrandbits(32) for _ in range(1000)))
    media = {0: [rng.getrandbits(64)], 3: [9, 5, 1], 10**6: [1], 2: []}
    options = {"lora": "a", "salt": "b", "media": media, "lookahead": lookahead}
    with_kernel = block_hashes(tokens, block_size, **options)
    extended = sequence_hashes(with_kernel[5:], 77)
    monkeypatch.setattr(kernel, "native", None)
    assert block_hashes(tokens, block_size, **options) == with_kernel
    assert sequence_hashes(with_kernel[5:], 77) == extended
    assert len(with_kernel) == (len(tokens) - lookahead) // block_size


@needs_kernel
def test_wrong_arguments_are_errors():
    native = kernel.native
    with pytest.raises(ValueError, match="at least one byte"):
        native.hash_pieces(b"x", 0, 4, 1)
    with pytest.raises(TypeError, match="usage"):
        native.hash_pieces(b"x", 1)
    with pytest.raises(TypeError):
        native.chain(5, 1, None)
    with pytest.raises(OverflowError):
        native.chain(b"", 1, -1)
    with pytest.raises(TypeError, match="usage"):
        native.Index().apply_stored(1)
    with pytest.raises(TypeError):
        native.Index().apply_stored("a", 0, b"")


def test_a_block_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="block_size"):
        local_hashes(range(4), 0)


def test_inputs_of_every_kind_hash_alike():
    ids = list(range(64))
    packed = hashes.pack_tokens(ids)
    expected = local_hashes(ids, 16)
    for form in (packed, memoryview(packed), array("I", ids), array("L", ids), tuple(ids), memoryview(array("I", ids))):
        assert local_hashes(form, 16) == expected
