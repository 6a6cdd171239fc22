"""``rbee-worker --config FILE``: one worker as a process, under systemd or by hand.

The order of imports is the start's speed: the engine process is forked off as soon as its own modules are there, gets the
configuration that the settings file most likely means (early.py), and loads while the settings are validated and the rest of the
front's modules (service.py) is imported.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from rbee_serve.common.sdnotify import Notifier
    from rbee_serve.contract.settings import WorkerSettings
    from rbee_serve.worker.engine.protocol import EngineConfig
    from rbee_serve.worker.engine.spawn import EngineChild

#: Arguments that begin so need no engine.
_WITHOUT_ENGINE = ("--ch", "--he", "--ve", "-h")


def engine_config(settings: WorkerSettings) -> EngineConfig:
    """Return what the engine process needs."""
    from rbee_serve.worker.engine.protocol import EngineConfig

    return EngineConfig(
        model_path=str(settings.model_path),
        model_sha256=settings.model_sha256,
        backend=settings.backend,
        device=settings.device,
        slots=settings.slots,
        context_tokens=settings.context_tokens,
        threads=settings.threads,
        prompt_block_tokens=settings.prompt_block_tokens,
        kv_type="q8_0" if settings.deterministic else settings.kv_type,
        cpu_variant=settings.cpu_variant,
        deterministic=settings.deterministic,
        memory_check=settings.memory_check,
        lora=settings.adapters,
        stream_gap_s=settings.stream_gap_s,
        draft_tokens=settings.draft_tokens,
        # A folder of its own: files of another instance are neither counted nor taken for wrong ones.
        prefix_store_dir=str(settings.prefix_store_dir / settings.name) if settings.prefix_store_dir else None,
        prefix_store_max_bytes=settings.prefix_store_max_bytes,
    )


def _run(args: argparse.Namespace, child: EngineChild | None, guess: dict[str, Any] | None, notifier: Notifier) -> int:
    from rbee_serve.contract.settings import WorkerSettings

    settings = WorkerSettings.load(args.config)
    config = engine_config(settings)
    if child is not None:
        import dataclasses

        from rbee_serve.worker.engine import wire

        if guess == dataclasses.asdict(config):
            child.tell(wire.SETTLED)
        else:
            if guess is not None:
                child.begin_anew()
            child.tell(wire.configuration(config))
    from rbee_serve.worker import service

    gc.freeze()  # modules stay: no collection looks at them again
    gc.enable()
    if args.check_config:
        service.check(settings)
        sys.stdout.write(f"{args.config}: ok\n")
        return 0
    if args.self_test:
        return service.self_test(settings, config, child)
    return service.start(settings, config, child, notifier)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 drained, or idle and its socket left to systemd; 1 the engine died, or there is no memory for
    the model; 75 that behind a socket, which waits on; 78 wrong settings, secrets, address or model file. 1 is tried again."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    gc.disable()  # a tenth of the time that imports take
    # An abbreviated or wrong argument may begin an engine that nobody needs: it is ended below.
    child = None if any(a.startswith(_WITHOUT_ENGINE) for a in arguments) else _begin_engine()
    try:
        return _main(arguments, child, None if child is None else _tell_early(child, arguments))
    finally:
        if child is not None:
            child.close()


def _begin_engine() -> EngineChild:
    from rbee_serve.worker.engine import child, spawn

    return spawn.EngineChild(child.run)


def _tell_early(child: EngineChild, arguments: list[str]) -> dict[str, Any] | None:
    """Let the engine load what the settings file most likely means; return what it was told."""
    from rbee_serve.worker import early
    from rbee_serve.worker.engine import wire

    guess = early.configuration(arguments, os.environ)
    if guess is not None:
        child.tell(wire.early_configuration(guess))
    return guess


def _main(arguments: list[str], child: EngineChild | None, guess: dict[str, Any] | None) -> int:
    import argparse
    from pathlib import Path

    from rbee_serve import __version__
    from rbee_serve.common.sdnotify import Notifier
    from rbee_serve.contract.errors import RbeeError

    parser = argparse.ArgumentParser(prog="rbee-worker", description="One model on one device, served over HTTP.")
    parser.add_argument("--config", type=Path, required=True, help="settings file, /etc/rbee/workers/NAME.toml")
    parser.add_argument("--check-config", action="store_true", help="check settings, secrets and model file, then exit")
    parser.add_argument("--self-test", action="store_true", help="load the model, make one token, say what it took, then exit")
    parser.add_argument("--version", action="version", version=f"rbee-worker {__version__}")
    args = parser.parse_args(arguments)
    notifier = Notifier()
    try:
        return _run(args, child, guess, notifier)
    except RbeeError as e:
        notifier.status(e.message)
        hint = f"; try: {e.hint}" if e.hint else ""
        sys.stderr.write(f"rbee-worker: {e.message}{hint}\n")
        return e.exit_code


if __name__ == "__main__":
    sys.exit(main())
