"""What is fixed about sampling, for those who choose tokens and those who say how it is done."""

from __future__ import annotations

#: Tokens that repetition_penalty looks back at, prompt included: llama.cpp's own default, and Ollama's.
REPETITION_WINDOW = 64
