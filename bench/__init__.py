"""What the published figures come from: whole processes, interleaved runs in one session, ratios.

Run by ``make bench``; never part of the tests. Peers are llama.cpp's own server, built from the very source that the
llama-cpp-python wheel vendors, and ``python -m llama_cpp.server``.
"""
