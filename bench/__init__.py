"""Parts of the published figures: whole processes, interleaved runs in one session, ratios.

Peers are llama.cpp's own server, built from the very source that the llama-cpp-python wheel vendors, and
``python -m llama_cpp.server``. Never part of the tests.
"""
