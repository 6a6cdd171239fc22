"""``rbee-queen --config FILE``: the queen as a process, under systemd or by hand."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rbee_serve import __version__
from rbee_serve.common.audit import AuditLog
from rbee_serve.common.credentials import (
    ClientKeys,
    check_private,
    credential_path,
    load_secret,
    refreshed,
    require_auth_for_bind,
)
from rbee_serve.common.http import RequestLimits
from rbee_serve.common.log import setup_logging
from rbee_serve.common.sdnotify import Notifier
from rbee_serve.common.serving import Server, run
from rbee_serve.contract.errors import ConfigInvalid, ExitCode
from rbee_serve.contract.settings import QueenSettings
from rbee_serve.queen.app import create_app
from rbee_serve.queen.hives import Hives
from rbee_serve.queen.state import Queen

logger = logging.getLogger(__name__)

#: Seconds that connections have to close once every stream has ended or was told to.
_CLOSE_S = 2.0


def load_secrets(settings: QueenSettings) -> tuple[ClientKeys | None, str | None]:
    """Return the clients' keys and the fleet token; raises ConfigInvalid, also where the address needs what is missing."""
    path = credential_path(settings.client_keys_file, "client-keys")
    keys = ClientKeys.load(path) if path is not None else None
    token = load_secret(settings.fleet_token_file, "fleet-token")
    require_auth_for_bind(settings.host, keys is not None and len(keys) > 0, "client keys (client_keys_file)")
    require_auth_for_bind(settings.host, token is not None, "a fleet token (fleet_token_file)")
    return keys, token


def tls_files(settings: QueenSettings) -> tuple[Path, Path] | None:
    """Return certificate and key, None for plain http; raises ConfigInvalid for one without the other."""
    key = credential_path(settings.tls_key_file, "tls-key")
    if settings.tls_cert_file is not None and key is not None:
        check_private(key)
        return settings.tls_cert_file, key
    if settings.tls_cert_file is None and settings.tls_key_file is None:
        return None
    missing = "tls_cert_file" if settings.tls_cert_file is None else "tls_key_file"
    raise ConfigInvalid(f"TLS needs a certificate and its key: {missing} is not set", hint=f"set {missing} (docs/settings.md)")


def open_audit(settings: QueenSettings, environ: Mapping[str, str] = os.environ) -> AuditLog | None:
    """Return the audit log, None where neither the settings nor systemd name a place for it; raises ConfigInvalid."""
    path = settings.audit_file
    if path is None and (state := environ.get("STATE_DIRECTORY")):
        path = Path(state.split(":")[0], "audit.jsonl")
    return None if path is None else AuditLog(path, max_bytes=settings.audit_max_bytes, keep=settings.audit_keep)


def reload_secrets(queen: Queen, environ: Mapping[str, str] = os.environ) -> None:
    """Read keys and fleet token again; what can not be taken is logged and the secrets stay as they were (SPEC E-23)."""
    try:
        token = load_secret(refreshed("fleet-token", environ) or queen.settings.fleet_token_file, "fleet-token", environ)
        require_auth_for_bind(queen.settings.host, token is not None, "a fleet token (fleet_token_file)")
        count = None
        if queen.client_keys is not None:
            count = queen.client_keys.reload(
                refreshed("client-keys", environ),
                check=lambda n: require_auth_for_bind(queen.settings.host, n > 0, "client keys"),
            )
    except ConfigInvalid as e:
        logger.error("secrets not reloaded: %s", e.message)
        return
    queen.fleet_token = queen.relay.token = token
    queen.record("secrets.reloaded", client_keys=count)
    logger.info("secrets reloaded", extra={"client_keys": count})


def reload(queen: Queen, environ: Mapping[str, str] = os.environ) -> None:
    """Take over changed secrets and a changed declaration of the fleet without dropping a stream."""
    reload_secrets(queen, environ)
    try:
        logger.info("declaration of the fleet read", extra={"hives": queen.hives.reload()})
    except ConfigInvalid as e:
        logger.error("declaration of the fleet not reloaded: %s", e.message)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM: 0. Wrong settings, secrets or address: 78, which systemd does not restart."""
    parser = argparse.ArgumentParser(prog="rbee-queen", description="Registry, scheduler and API of an rbee fleet.")
    parser.add_argument("--config", type=Path, default=Path("/etc/rbee/queen.toml"), help="settings file (default: %(default)s)")
    parser.add_argument("--check-config", action="store_true", help="check settings and secrets, then exit")
    parser.add_argument("--version", action="version", version=f"rbee-queen {__version__}")
    args = parser.parse_args(argv)
    notifier = Notifier()
    try:
        settings = QueenSettings.load(args.config)
        keys, token = load_secrets(settings)
        tls_files(settings)
        Hives(settings.fleet_file).reload()
        if args.check_config:
            sys.stdout.write(f"{args.config}: ok\n")
            return ExitCode.OK
        setup_logging(settings.log_level, settings.log_format)
        where = f"{'http' if tls_files(settings) is None else 'https'}://{settings.host}:{settings.port}"
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # one that comes before `started` must not end the process

        async def started() -> None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload, queen)
            logger.info("queen %s listens on %s", __version__, where)
            queen.record("queen.start", version=__version__)
            notifier.ready(f"listening on {where}")

        audit = open_audit(settings)
        app = create_app(settings, client_keys=keys, fleet_token=token, audit=audit)
        queen: Queen = app.state.queen
        queen.hives.reload()

        def served(server: Server) -> None:
            queen.leave = lambda: setattr(server, "should_exit", True)

        async def drain() -> None:
            notifier.stopping(f"draining {len(queen.relay.streams)} stream(s)")
            queen.record("queen.stop")
            await queen.drain()

        run(
            app,
            host=settings.host,
            port=settings.port,
            notifier=notifier,
            on_started=started,
            on_shutdown=drain,
            graceful_timeout_s=_CLOSE_S,
            on_server=served,
            keep_socket=True,
            limits=RequestLimits.of(settings),
            tls=tls_files(settings),
        )
    except ConfigInvalid as e:
        notifier.status(e.message)
        hint = f"\n  try: {e.hint}" if e.hint else ""
        sys.stderr.write(f"rbee-queen: {e.message}{hint}\n")
        return e.exit_code
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
