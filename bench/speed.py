"""``speed.py MODEL THREADS``: tokens a second of the llama.cpp build on the path, prompt and decode, as one JSON object."""

from __future__ import annotations

import json
import sys
import time

from llama_cpp import Llama

from rbee_serve.worker.engine import libs
from rbee_serve.worker.engine.weights import bindings

PROMPT_TOKENS, TOKENS = 512, 128
#: The best of so many is taken: on a shared machine the others say what the neighbours did.
TRIES = 4


def main() -> None:
    """Measure each, after a prompt that warms up."""
    model, threads = sys.argv[1:]
    libs.load_cpu_variant(bindings())
    llama = Llama(model, n_ctx=2048, n_batch=PROMPT_TOKENS, n_threads=int(threads), n_threads_batch=int(threads), verbose=False)
    prompt = [100 + n for n in range(PROMPT_TOKENS)]
    llama.eval(prompt)
    best = {"prompt": 0.0, "decode": 0.0}
    for _ in range(TRIES):
        llama.reset()
        began = time.monotonic()
        llama.eval(prompt)
        middle = time.monotonic()
        for _ in range(TOKENS):
            llama.eval([int(llama.sample(temp=0.0))])
        end = time.monotonic()
        best = {
            "prompt": max(best["prompt"], PROMPT_TOKENS / (middle - began)),
            "decode": max(best["decode"], TOKENS / (end - middle)),
        }
    print(json.dumps(best))


if __name__ == "__main__":
    main()
