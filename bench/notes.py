"""Why a goal is missed where it is, shown beside the row as long as it is missed. What was not profiled says so."""

NOTES: dict[str, str] = {
    "throughput/1": "The same kernels. By itself the engine makes 155 to 175 tok/s on this machine; what is left is the front, "
    "which shares two cores with two compute threads and the client. Tokens of two or three steps go to it together (one by one: "
    "0.85 x). With GOMP_SPINCOUNT=10000 it is parity, and a busy machine then makes 3 tok/s instead of 32: not the default.",
    "throughput/8": "The spreads of both servers overlap: parity, on two cores that also run the client.",
    "throughput-1b/1": "The spreads of both servers overlap: parity. One stream reads all weights for each token, with the same "
    "kernels in both servers.",
    "throughput/ttft-16": "Prompts are read one after the other, and each stream begins when its own is read; llama-server's "
    "begin when all are. So half of the streams have begun after half of the time: with the same kernels 0.5 x is what order "
    "alone can give, and less would need fewer evaluated tokens.",
    "binding/ttft-8": "Eight prompts are read one after the other on two cores, and half of the streams have begun after half of "
    "that: 0.6 s. The peer's own figure was 6 s in one round and 17 s in the other.",
    "python/8": "By the clock, of the whole loop: 0.4 ms of a step of 16 ms. On a machine of half the speed, where a step takes "
    "twice as long and this does not, 1.72 %. The loop's thread also waits for a core: two compute threads, the front and the "
    "client share two.",
    "start/135M": "Profiled, ms from exec on cores that others shared: 75 until the engine's interpreter runs, 85 its imports "
    "and the bindings, 20-80 looking for room and kernels while numpy is imported and the settings are read beside it, 180 the "
    "weights, 120 the context (190 MB of KV cache are zeroed), 20 the self test, 75 the prompt.",
    "wake/135M": "Most of it is the start (see start); 64 tokens are evaluated again to stay exact, and without the prefix it is "
    "0.7 s more only on a machine of this speed (2 s on the one of the day before: 0.305 x).",
    "woken/135M": "Weights, context and prompt are the same work; 0.2 s before it are interpreters, imports and bindings, which "
    "the peer's time leaves out, and the front's imports share its two cores.",
    "woken/1.1B": "Before llama.cpp's load 0.2 s of interpreters and imports, which the peer's time leaves out; the load is "
    "slower while the front imports beside it. On a machine of half the speed, where those weigh less: 1.26 x.",
    "wake/1.1B": "Nearly all of it is the start (see woken), which a quicker machine shortens less than the prompt; on one of "
    "half the speed it was 0.162 x.",
    "throughput-1b/8": "The spreads overlap; the speed of the machine changes by a fifth: 0.83 to 1.03 x in two days, parity.",
    "fleet-one/stop": "By CPU time: Ansible's YAML files, plugins and the play 0.3 s, the task 0.1 s here, 0.1 s on the machine; "
    "Ansible's imports (0.4 s) and rbee-ctl's own run side by side.",
    "fleet-one/start": "As for stop, with the preflight as a task more; two tasks with nothing to do cost 0.02 s each. "
    "1.29 s ten minutes before on the same machine, when all of it was a fifth slower.",
    "fleet-twenty/time": "All twenty machines are containers on the same two cores as Ansible: their Python, not the order of "
    "the work, is what takes the time.",
}
