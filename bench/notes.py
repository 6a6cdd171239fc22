"""Why a goal is missed where it is, shown beside the row as long as it is missed. What was not profiled says so."""

NOTES: dict[str, str] = {
    "throughput/1": "The same kernels; this machine's speed changes between sessions (1.13 x in one earlier the same day, at "
    "nearly twice the tokens per second of both). What one stream costs beside llama.cpp's decode is not profiled.",
    "throughput/8": "The spreads of both servers overlap almost wholly: parity, on two cores that also run the client.",
    "throughput-1b/1": "The spreads of both servers overlap: parity. One stream reads all weights for each token, with the same "
    "kernels in both servers.",
    "throughput/ttft-16": "Prompts are read one after the other, and each stream begins when its own is read; llama-server's "
    "begin when all are. So half of the streams have begun after half of the time: with the same kernels 0.5 x is what order "
    "alone can give, and less would need fewer evaluated tokens.",
    "binding/ttft-8": "Eight prompts are read one after the other on two cores, and half of the streams have begun after half of "
    "that: 0.6 s. The peer's own figure was 6 s in one round and 17 s in the other.",
    "python/8": "By the clock, of the whole loop. Worked out from its parts, not profiled: what Python computes for eight "
    "streams (argmax 5 us a token, the rest less) is well under 1 % of a step of 40 ms, so most of it should be the loop's "
    "thread waiting for a core: two compute threads, the front and the client share two.",
    "start/135M": "The engine process begins ahead of the worker's own imports (0.98 s before that); what remains is two "
    "interpreters that import numpy, llama.cpp's bindings and starlette on two cores, and the self test. Not profiled further.",
    "wake/135M": "Most of it is the start (see woken); 64 tokens are evaluated again to stay exact, and without the prefix it is "
    "2 s more only.",
    "woken/135M": "llama.cpp loads the model and makes its context in 0.35 s here; the rest is an interpreter with numpy and the "
    "bindings (0.2 s), the front beside it on the same two cores, and the test's own poll.",
    "woken/1.1B": "0.6 s as with the small model, and llama.cpp's load is slower while the front imports beside it: 0.9 s alone.",
    "fleet-one/stop": "Profiled: ansible-playbook takes 0.85 s to begin, its first task on a machine 0.5 s (another one 0.28 s, "
    "of which 0.2 s compile Ansible's own modules on the node, each time), rbee-ctl 0.2-0.4 s.",
    "fleet-one/start": "As for stop; the preflight is a task more, and a model that takes over a second to load is followed and "
    "reported by two more.",
    "fleet-twenty/time": "All twenty machines are containers on the same two cores as Ansible: their Python, not the order of "
    "the work, is what takes the time.",
}
