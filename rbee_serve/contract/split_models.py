"""How the files of a split model are named: as llama.cpp names and looks for them (``llama_split_path``)."""

from __future__ import annotations

import re

_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")


def set_of(name: str) -> list[str]:
    """Return the names of all parts of the model that a file ``NAME-00002-of-00003.gguf`` is one of, in order; else its own."""
    if (match := _PART.fullmatch(name)) is None:
        return [name]
    return [f"{match[1]}-{n:05d}-of-{match[2]}.gguf" for n in range(1, int(match[2]) + 1)]
