"""Model files for tests of downloads and catalogs: noise, of no use to llama.cpp, and a real model in parts."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from rbee_serve.models import gguf


def write_gguf(path: Path, tensors: int, **options: Any) -> Path:
    """Write a GGUF with ``tensors`` MB of noise."""
    import numpy as np
    from gguf import GGUFWriter

    rng = np.random.default_rng(1)
    writer = GGUFWriter(path, arch="llama", **options)
    writer.add_block_count(2)
    for i in range(tensors):
        writer.add_tensor(f"blk.{i}.weight", rng.random((512, 512), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def split_gguf(source: Path, folder: Path, parts: int) -> list[Path]:
    """Write a model as ``parts`` files, as llama.cpp's gguf-split does: all that it says in the first one, the weights in all."""
    with source.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        begin = 24  # magic, version, how many tensors, how many pairs
        version, count, pairs = struct.unpack_from("<IQQ", data, 4)
        at = gguf._Cursor(data, begin)
        for _ in range(pairs):
            at.string()
            at.value(at.scalar(struct.Struct("<I")))
        said = data[begin : at.at]
        tensors = []
        for _ in range(count):
            start = at.at
            at.string()
            at.skip(8 * at.scalar(struct.Struct("<I")) + 4)
            tensors.append((data[start : at.at], at.scalar(struct.Struct("<Q"))))
        weights = _aligned(at.at)
        ends = [offset for _, offset in tensors[1:]] + [len(data) - weights]
        blobs = [(info, data[weights + offset : weights + end]) for (info, offset), end in zip(tensors, ends, strict=True)]
    assert [offset for _, offset in tensors] == sorted(offset for _, offset in tensors)
    written = []
    for number in range(parts):
        mine = blobs[count * number // parts : count * (number + 1) // parts]
        own = [("split.no", 2, struct.pack("<H", number)), ("split.count", 2, struct.pack("<H", parts))]
        own += [("split.tensors.count", 5, struct.pack("<i", count))]
        keys = b"".join(struct.pack("<Q", len(k)) + k.encode() + struct.pack("<I", kind) + value for k, kind, value in own)
        head = gguf.MAGIC + struct.pack("<IQQ", version, len(mine), len(own) + (0 if number else pairs))
        head += keys + (b"" if number else said)
        body = b""
        for info, blob in mine:
            head += info + struct.pack("<Q", len(body))
            body += blob.ljust(_aligned(len(blob)), b"\0")
        path = folder / f"{source.stem}-{number + 1:05d}-of-{parts:05d}.gguf"
        path.write_bytes(head.ljust(_aligned(len(head)), b"\0") + body)
        written.append(path)
    return written


def _aligned(size: int) -> int:
    return -(-size // 32) * 32
