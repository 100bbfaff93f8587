"""A loaded model and one llama.cpp context: decode a step, read logits, move KV cache between slots.

One slot is one llama.cpp sequence with a KV cache of its own (``kv_unified`` off), because only then does the
order of cells, and with it the order of floating point sums, not depend on what other sequences do.

Must never be used by two threads at once, and never decide which tokens to compute.
"""

from __future__ import annotations

import ctypes as c
import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from holdfast.base.errors import EngineFailed
from holdfast.engines.llamacpp.config import CHUNK_TOKENS
from holdfast.engines.llamacpp.library import Batch, LlamaLibrary

Logits = npt.NDArray[np.float32]
NO_SLOT = 1
"""``llama_decode``: the KV cache has no room; nothing was changed."""


class LlamaModel:
    """Weights and vocabulary."""

    def __init__(self, library: LlamaLibrary, path: Path):
        """Load the weights (memory-mapped). Raises EngineFailed with the library's own complaint."""
        self.library = library
        self.handle: int | None = library.model_load_from_file(str(path).encode(), library.model_params())
        if not self.handle:
            raise EngineFailed(f"llama.cpp cannot load {path}: {'; '.join(library.complaints) or 'no reason given'}")
        self.vocab = library.model_get_vocab(self.handle)
        self.vocab_size: int = library.vocab_n_tokens(self.vocab)
        self.trained_context: int = library.model_n_ctx_train(self.handle)

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Return every token that ends a generation (end of sequence, end of turn …)."""
        return tuple(i for i in range(self.vocab_size) if self.library.vocab_is_eog(self.vocab, i))

    @functools.cached_property
    def markers(self) -> npt.NDArray[np.bool_]:
        """Return which tokens are control markers that do not end a generation: never part of a text."""
        control, ends = self.library.vocab_is_control, self.library.vocab_is_eog
        return np.array([control(self.vocab, i) and not ends(self.vocab, i) for i in range(self.vocab_size)])

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Return llama.cpp's own tokenization; used to verify tokenizer files."""
        data = text.encode()
        room = len(data) + 16
        out = (c.c_int32 * room)()
        count = self.library.tokenize(self.vocab, data, len(data), out, room, add_special, parse_special)
        return list(out[:count])

    def piece(self, token: int) -> bytes:
        """Return the bytes of a token, special tokens spelled out."""
        buffer = c.create_string_buffer(512)
        count = self.library.token_to_piece(self.vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[: max(count, 0)]

    def close(self) -> None:
        """Free the weights. Idempotent; every context must be closed before."""
        handle, self.handle = self.handle, None
        if handle:
            self.library.model_free(handle)


class LlamaContext:
    """The KV cache of ``slots`` sequences and the batch that is handed to ``llama_decode``."""

    def __init__(self, model: LlamaModel, *, slots: int, context_length: int, threads: int):
        """Allocate. Raises EngineFailed when there is not enough memory."""
        self._library = model.library
        self._vocab_size = model.vocab_size
        params = model.library.context_params(
            unified=False,
            n_ctx=context_length * slots,
            n_batch=CHUNK_TOKENS,
            n_ubatch=CHUNK_TOKENS,
            n_seq_max=slots,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn_type=1,
        )
        self.handle: int | None = model.library.init_from_model(model.handle, params)
        if not self.handle:
            raise EngineFailed(
                f"llama.cpp cannot allocate a KV cache of {slots} x {context_length} tokens: "
                f"{'; '.join(model.library.complaints) or 'no reason given'}. Lower context_length or max_num_seqs."
            )
        self._memory = model.library.get_memory(self.handle)
        self._count = 0
        self._token = (c.c_int32 * CHUNK_TOKENS)()
        self._position = (c.c_int32 * CHUNK_TOKENS)()
        self._slot = (c.c_int32 * CHUNK_TOKENS)()
        self._wanted = (c.c_int8 * CHUNK_TOKENS)()
        self._batch = self._make_batch()

    def _make_batch(self) -> Batch:
        int_pointer = c.POINTER(c.c_int32)
        self._ones = (c.c_int32 * CHUNK_TOKENS)(*([1] * CHUNK_TOKENS))
        base, size = c.addressof(self._slot), c.sizeof(c.c_int32)
        self._slot_pointers = (int_pointer * CHUNK_TOKENS)(
            *(c.cast(base + i * size, int_pointer) for i in range(CHUNK_TOKENS))
        )
        batch = Batch()
        batch.token = c.cast(self._token, int_pointer)
        batch.pos = c.cast(self._position, int_pointer)
        batch.n_seq_id = c.cast(self._ones, int_pointer)
        batch.seq_id = c.cast(self._slot_pointers, c.POINTER(int_pointer))
        batch.logits = c.cast(self._wanted, c.POINTER(c.c_int8))
        return batch

    @property
    def capacity(self) -> int:
        """Cells over all slots, as really allocated."""
        return int(self._library.n_ctx(self.handle))

    def begin(self) -> None:
        """Start a new batch."""
        self._count = 0

    def add(self, slot: int, tokens: list[int], position: int, *, wanted: bool) -> int:
        """Append tokens of one slot; ``wanted``: logits of the last one. Returns that one's row for `logits`."""
        start, end = self._count, self._count + len(tokens)
        for at, token in enumerate(tokens, start):
            self._token[at] = token
            self._position[at] = position + at - start
            self._slot[at] = slot
            self._wanted[at] = 0
        self._wanted[end - 1] = int(wanted)
        self._count = end
        return end - 1

    def decode(self) -> int:
        """Compute the batch. Returns 0, or `NO_SLOT` (nothing changed). Raises EngineFailed otherwise."""
        self._batch.n_tokens = self._count
        code = int(self._library.decode(self.handle, self._batch))
        if code in (0, NO_SLOT):
            return code
        raise EngineFailed(f"llama_decode failed with code {code}: {'; '.join(self._library.complaints)}")

    def logits(self, row: int) -> Logits:
        """Return the raw logits of a batch row; a view that is valid until the next `decode`."""
        pointer = self._library.get_logits_ith(self.handle, row)
        if not pointer:
            raise EngineFailed(f"llama.cpp has no logits for batch row {row}.")
        view: Any = np.ctypeslib.as_array(pointer, shape=(self._vocab_size,))
        return view  # type: ignore[no-any-return]

    def truncate(self, slot: int, length: int) -> None:
        """Forget everything of a slot from position ``length`` on."""
        if not self._library.memory_seq_rm(self._memory, slot, length, -1):
            raise EngineFailed(f"llama.cpp cannot cut the KV cache of slot {slot} at {length}.")

    def copy(self, source: int, target: int, length: int) -> None:
        """Make ``target`` hold the first ``length`` positions of ``source``.

        Between KV streams llama.cpp only copies whole sequences, hence copy and cut.
        """
        self._library.memory_seq_cp(self._memory, source, target, -1, -1)
        self.truncate(target, length)

    def close(self) -> None:
        """Free the KV cache. Idempotent."""
        handle, self.handle = self.handle, None
        if handle:
            self._library.free(handle)
