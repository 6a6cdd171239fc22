"""Names of the forms in which models write tool calls; the worker tells in ``started`` which one to expect."""

from __future__ import annotations

#: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``; also what models are told whose template knows no tools.
HERMES = "hermes"
#: ``{"name": ..., "parameters": {...}}``, the whole answer being calls; also the form of a call that was enforced.
LLAMA3 = "llama3"
#: ``[TOOL_CALLS][{"name": ..., "arguments": {...}}]`` or ``[TOOL_CALLS]name[ARGS]{...}``.
MISTRAL = "mistral"
