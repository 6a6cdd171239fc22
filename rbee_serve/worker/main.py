"""``rbee-worker --config FILE``: one worker as a process, under systemd or by hand.

The order of imports is the start's speed: the engine process is begun first, gets its configuration as soon as the settings
are read, and loads while the front's own modules (service.py) are imported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rbee_serve import __version__
from rbee_serve.common.sdnotify import Notifier
from rbee_serve.contract.errors import RbeeError
from rbee_serve.worker.engine.spawn import EngineChild

if TYPE_CHECKING:
    from rbee_serve.contract.settings import WorkerSettings
    from rbee_serve.worker.engine.protocol import EngineConfig


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
        lora=settings.adapters,
        stream_gap_s=settings.stream_gap_s,
        draft_tokens=settings.draft_tokens,
        # A folder of its own: files of another instance are neither counted nor taken for wrong ones.
        prefix_store_dir=str(settings.prefix_store_dir / settings.name) if settings.prefix_store_dir else None,
        prefix_store_max_bytes=settings.prefix_store_max_bytes,
    )


def _run(args: argparse.Namespace, child: EngineChild | None, notifier: Notifier) -> int:
    from rbee_serve.contract.settings import WorkerSettings

    settings = WorkerSettings.load(args.config)
    config = engine_config(settings)
    if child is not None:
        from rbee_serve.worker.engine.wire import configuration

        child.tell(configuration(config))
    from rbee_serve.worker import service

    if args.check_config:
        service.check(settings)
        sys.stdout.write(f"{args.config}: ok\n")
        return 0
    if args.self_test:
        return service.self_test(settings, config, child)
    return service.start(settings, config, child, notifier)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 drained, or idle and its socket left to systemd; 1 the engine died; 78 wrong settings, secrets, address
    or model file, which systemd does not try again."""
    parser = argparse.ArgumentParser(prog="rbee-worker", description="One model on one device, served over HTTP.")
    parser.add_argument("--config", type=Path, required=True, help="settings file, /etc/rbee/workers/NAME.toml")
    parser.add_argument("--check-config", action="store_true", help="check settings, secrets and model file, then exit")
    parser.add_argument("--self-test", action="store_true", help="load the model, make one token, say what it took, then exit")
    parser.add_argument("--version", action="version", version=f"rbee-worker {__version__}")
    args = parser.parse_args(argv)
    notifier = Notifier()
    child = None if args.check_config else EngineChild()
    try:
        return _run(args, child, notifier)
    except RbeeError as e:
        notifier.status(e.message)
        hint = f"; try: {e.hint}" if e.hint else ""
        sys.stderr.write(f"rbee-worker: {e.message}{hint}\n")
        return e.exit_code
    finally:
        if child is not None:
            child.close()


if __name__ == "__main__":
    sys.exit(main())
