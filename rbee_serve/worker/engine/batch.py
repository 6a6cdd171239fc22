"""A ``llama_batch`` over arrays of ours: a step fills slices instead of calling ctypes per token."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np


class Batch:
    """Rows of ``tokens``, ``pos``, ``seq`` and ``logits`` (1: the row's result is kept) for one call; ``struct`` is what
    llama.cpp reads, of which the first ``size`` rows count."""

    def __init__(self, ll: Any, capacity: int) -> None:
        self.capacity = capacity
        self.tokens = np.zeros(capacity, np.int32)
        self.pos = np.zeros(capacity, np.int32)
        self.seq = np.zeros(capacity, np.int32)
        self.logits = np.zeros(capacity, np.int8)
        self._n_seq = np.ones(capacity, np.int32)
        int32_p = ctypes.POINTER(ctypes.c_int32)
        base = self.seq.ctypes.data
        self._seq_pointers = (int32_p * capacity)(*(ctypes.cast(base + 4 * i, int32_p) for i in range(capacity)))
        struct = self.struct = ll.llama_batch()
        struct.token = self.tokens.ctypes.data_as(int32_p)
        struct.embd = None
        struct.pos = self.pos.ctypes.data_as(int32_p)
        struct.n_seq_id = self._n_seq.ctypes.data_as(int32_p)
        struct.seq_id = ctypes.cast(self._seq_pointers, type(struct.seq_id))
        struct.logits = self.logits.ctypes.data_as(type(struct.logits))

    @property
    def size(self) -> int:
        """Rows in use."""
        return int(self.struct.n_tokens)

    @size.setter
    def size(self, rows: int) -> None:
        self.struct.n_tokens = rows
