"""``speed.py MODEL THREADS``: tokens a second of the llama.cpp build on the path, prompt and decode, as one JSON object."""

from __future__ import annotations

import json
import sys
import time

from llama_cpp import Llama

from rbee_serve.worker.engine import libs
from rbee_serve.worker.engine.llama import bindings

PROMPT_TOKENS, TOKENS = 512, 128


def main() -> None:
    """Measure each once, after a prompt that warms up."""
    model, threads = sys.argv[1:]
    libs.load_cpu_variant(bindings())
    llama = Llama(model, n_ctx=2048, n_batch=PROMPT_TOKENS, n_threads=int(threads), n_threads_batch=int(threads), verbose=False)
    prompt = [100 + n for n in range(PROMPT_TOKENS)]
    llama.eval(prompt)
    llama.reset()
    began = time.monotonic()
    llama.eval(prompt)
    middle = time.monotonic()
    for _ in range(TOKENS):
        llama.eval([int(llama.sample(temp=0.0))])
    end = time.monotonic()
    print(json.dumps({"prompt": PROMPT_TOKENS / (middle - began), "decode": TOKENS / (end - middle)}))


if __name__ == "__main__":
    main()
