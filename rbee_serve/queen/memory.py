"""What the queen keeps on disk: workers that sleep and workers that were retired (SPEC N-03, N-08, OP-27).

Everybody else tells of himself within one heartbeat; of those only the names are kept, so that until then a request for
their model is told to come again, and not that nobody knows it. One small JSON file, replaced in one step, so that a crash
leaves the old or the new one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from pathlib import Path

from pydantic import ValidationError

from rbee_serve.queen.registry import Registry

logger = logging.getLogger(__name__)

FILE_NAME = "workers.json"


class Memory:
    """Writes the registry's memory whenever it changes; ``load`` once, ``aclose`` at the end."""

    def __init__(self, registry: Registry, directory: Path) -> None:
        self._registry, self._path = registry, directory / FILE_NAME
        self._writing: asyncio.Task[None] | None = None
        self._changed = False
        registry.on_change = self._note

    def load(self, now: float) -> None:
        """Take back what was kept. A file that cannot be read is set aside as ``.corrupt`` and said in the log."""
        try:
            self._registry.restore(json.loads(self._path.read_text(encoding="utf-8")), now)
        except FileNotFoundError:
            return
        except OSError as e:
            logger.error("known workers cannot be read", extra={"path": str(self._path), "reason": str(e)})
        except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as e:
            aside = self._path.with_suffix(".corrupt")
            self._path.replace(aside)
            logger.error("the list of known workers was damaged and is set aside", extra={"path": str(aside), "reason": str(e)})

    def _note(self) -> None:
        self._changed = True
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write())

    async def _write(self) -> None:
        while self._changed:
            self._changed = False
            text = json.dumps(self._registry.memory(), indent=1) + "\n"
            try:
                await asyncio.to_thread(self._replace, text)
            except OSError as e:
                logger.error("known workers cannot be written", extra={"path": str(self._path), "reason": str(e)})

    def _replace(self, text: str) -> None:
        new = self._path.with_suffix(".new")
        with new.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        new.replace(self._path)

    async def aclose(self) -> None:
        """Wait until everything is on disk."""
        if self._writing is not None:
            await self._writing
