"""Why a goal is missed where it is, shown beside the row as long as it is missed. What was not profiled says so."""

NOTES: dict[str, str] = {
    "throughput/plain-1": "The same kernels. What is left is the front, which shares two cores with two compute threads and the "
    "client. Tokens of a few steps go to it together (one by one: 0.85 x). With GOMP_SPINCOUNT=10000 it is parity, and a busy "
    "machine then makes 3 tok/s instead of 32: not the default.",
    "throughput/plain-8": "The spreads of both servers overlap: parity, on two cores that also run the client.",
    "throughput-1b/plain-1": "The spreads of both servers overlap: parity. One stream reads all weights for each token, with the "
    "same kernels in both servers.",
    "throughput/ttft-16": "Prompts are read one after the other, and each stream begins when its own is read; llama-server's "
    "begin when all are. So half of the streams have begun after half of the time: with the same kernels 0.5 x is what order "
    "alone can give, and less would need fewer evaluated tokens.",
    "python/8": "By the clock: 0.3 ms of a step of 16 ms. The engine alone, without front and client on its two cores: 0.26 ms, "
    "1.3 to 1.6 %.",
    "start/135M": "Profiled, ms from exec: 15 until the interpreter runs, 45 the engine's modules, then its process is forked "
    "off; 30 bindings, header and kernels, 110 to 130 the weights, 80 to 105 the context (190 MB of KV cache are zeroed) while "
    "numpy is imported, 15 the self test, 45 the prompt.",
    "wake/135M": "Three quarters of it are the start (see start), the rest 64 tokens that are evaluated again to stay exact: "
    "80 ms, twice what they take without 1,000 others to look at. Without the prefix it is 1.2 to 1.4 s.",
    "woken/135M": "Weights, context and prompt are the same work, 0.25 s of it. Before it are 0.08 s of interpreter, modules "
    "and bindings, which the peer's time leaves out, 0.03 s are the self test and the way through the front, and what the "
    "front and numpy take of the two cores meanwhile is 0.03 s.",
    "woken/1.1B": "As for 135M; the load is slower while the front imports beside it.",
    "wake/1.1B": "Two thirds are the start, a third the 64 tokens that are evaluated again to stay exact; reading, checking "
    "and taking over the prefix are 15 ms. 0.19 to 0.21 x from run to run.",
    "throughput-1b/plain-8": "The spreads overlap; the speed of the machine changes by a fifth: 0.83 to 1.03 x in two days.",
    "throughput-1b/p99-8": "With guesses a step evaluates 16 rows instead of 8 and takes 1.5 times as long, and brings two "
    "tokens to each stream; the figure is the longest of 64 such steps.",
    "fleet-one/stop": "By CPU time: Ansible's YAML files, plugins and the play 0.3 s, the task 0.1 s here, 0.1 s on the "
    "machine; Ansible's imports (0.4 s) and rbee-ctl's own run side by side.",
    "fleet-one/start": "As for stop, with the preflight as a task more; two tasks with nothing to do cost 0.02 s each. 1.29 s "
    "ten minutes before on the same machine, when all of it was a fifth slower.",
    "fleet-twenty/time": "All twenty machines are containers on the same two cores as Ansible: their Python, not the order of "
    "the work, is what takes the time.",
    "throughput/p99-8": "Seven of a round's 1,016 pauses are those of the streams whose prompts were read first; so the figure "
    "is the longest of 127 steps, whatever held that one up.",
}
