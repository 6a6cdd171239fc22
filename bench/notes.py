"""Why a goal is missed where it is, shown beside the row as long as it is missed. What was not profiled says so."""

_BURST = (
    "Measured before bursts of short prompts were read through first (docs/architecture.md): a step for everybody came between "
    "any two or three prompts. Not measured again yet."
)
_START = (
    "Measured before the engine process was begun ahead of the worker's own imports: 0.4 s that came one after the other and "
    "now run beside the loading of the model. Not measured again yet."
)

NOTES: dict[str, str] = {
    "throughput/1": "The same kernels; this machine's speed changes between sessions (1.13 x in one earlier the same day, at "
    "nearly twice the tokens per second of both). What one stream costs beside llama.cpp's decode is not profiled.",
    "throughput/8": "The spreads of both servers overlap almost wholly: parity, on two cores that also run the client.",
    "throughput-1b/1": "The spreads of both servers overlap: parity. One stream reads all weights for each token, with the same "
    "kernels in both servers.",
    "throughput/p99-8": _BURST + " The figure is the eleventh longest of about a thousand pauses, so it is one of the burst's.",
    "throughput-1b/p99-8": _BURST
    + " With this model a prompt of 64 tokens alone takes longer than the gap of 0.25 s, so a step came "
    "after every one.",
    "throughput/ttft-16": "Prompts are read one after the other, and each stream begins when its own is read; llama-server's "
    "begin when all are. So half of the streams have begun after half of the time: with the same kernels 0.5 x is what order "
    "alone can give, and less would need fewer evaluated tokens.",
    "binding/ttft-8": _BURST + " One of the two rounds took twice as long as the other.",
    "shared/warm": _BURST + " Besides, to stay exact with an f16 cache the last 64 tokens of each prompt are evaluated again, "
    'of which 24 are new; with kv_type = "q8_0" it would be the 24.',
    "python/8": "By the clock, of the whole loop. Worked out from its parts, not profiled: what Python computes for eight "
    "streams (argmax 5 us a token, the rest less) is well under 1 % of a step of 40 ms, so most of it should be the loop's "
    "thread waiting for a core: two compute threads, the front and the client share two.",
    "start/135M": "The engine process begins ahead of the worker's own imports (0.98 s before that); what remains is two "
    "interpreters that import numpy, llama.cpp's bindings and starlette on two cores, and the self test. Not profiled further.",
    "wake/135M": _START + " Besides, 64 tokens are evaluated again to stay exact, and without the prefix it is 2 s more only.",
    "wake/1.1B": _START,
    "woken/135M": "llama.cpp loads the model and makes its context in 0.35 s here; the rest is an interpreter with numpy and the "
    "bindings (0.2 s), the front beside it on the same two cores, and the test's own poll.",
    "woken/1.1B": "0.6 s as with the small model, and llama.cpp's load is slower while the front imports beside it: 0.9 s alone.",
    "fleet-one/stop": "ansible-playbook itself takes over a second to begin here; of ours are two tasks (the check of the "
    "arguments, the stop).",
    "fleet-one/start": "As for stop; the preflight, the instance's files and what follows the loading come on top.",
    "fleet-twenty/time": "All twenty machines are containers on the same two cores as Ansible: their Python, not the order of "
    "the work, is what takes the time.",
}
