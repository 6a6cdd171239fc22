"""``bare.py MODEL THREADS PROMPT``: load a model and evaluate a prompt with llama-cpp-python alone, imported before.

Prints the seconds from then to the first token: what no server can do without.
"""

from __future__ import annotations

import sys
import time

from llama_cpp import Llama

from bench.servers import CONTEXT_TOKENS
from rbee_serve.worker.engine import libs
from rbee_serve.worker.engine.weights import bindings


def main() -> None:
    """Time it once."""
    model, threads, prompt = sys.argv[1:]
    libs.load_cpu_variant(bindings())
    began = time.monotonic()
    llama = Llama(model, n_ctx=4 * CONTEXT_TOKENS, n_threads=int(threads), n_threads_batch=int(threads), verbose=False)
    llama.eval(llama.tokenize(prompt.encode()))
    llama.sample(temp=0.0)
    print(time.monotonic() - began)


if __name__ == "__main__":
    main()
