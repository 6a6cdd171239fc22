"""Fetch a model on the controller and show how far it is; see library/rbee_fetch.py."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

display = Display()

#: Between two lines of a transfer, seconds.
SAY_EVERY_S = 1.0


class ActionModule(ActionBase):
    """The action ``rbee_fetch``."""

    _requires_connection = False
    _supports_check_mode = True
    _VALID_ARGS = frozenset(
        ("ref", "models_dir", "sha256", "endpoint", "token", "token_file", "tries", "pause_s", "stall_timeout_s", "bytes_per_s")
    )

    def run(self, tmp=None, task_vars=None):
        """Return the model's entry and its files; see the documentation in library/rbee_fetch.py."""
        super().run(tmp, task_vars)
        spec = {name: {"type": "str"} for name in self._VALID_ARGS}
        _, args = self.validate_argument_spec(
            spec | {"ref": {"required": True}, "models_dir": {"type": "path", "required": True}}
        )
        if self._task.check_mode:
            return {"changed": True, "skipped": True}
        token, file = args.pop("token") or os.environ.get("HF_TOKEN"), args.pop("token_file")
        if not token and file:
            token = self._token(Path(file).expanduser())
        with tempfile.TemporaryDirectory(prefix="rbee-fetch-") as folder:
            environ = {k: v for k, v in os.environ.items() if k not in ("CREDENTIALS_DIRECTORY", "HF_TOKEN")}
            progress = Path(folder, "progress.jsonl")
            flags = [f"--{k.replace('_', '-')}={v}" for k, v in args.items() if v is not None]
            command = [task_vars["ansible_playbook_python"], "-m", "rbee_serve.models.download", *flags]
            with tempfile.TemporaryFile() as said:
                process = subprocess.Popen(
                    [*command, f"--progress-file={progress}", "--token-stdin"],
                    env=environ,
                    stdin=subprocess.PIPE,
                    stdout=said,
                    stderr=said,
                )
                # By a pipe: in no file, no argument, no environment.
                with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
                    pipe.write((token or "").encode())
                last = self._follow(process, progress)
                said.seek(0)
                words = said.read().decode(errors="replace").strip().splitlines()[-1:]
        return self._result(args, last, process.returncode, words)

    @staticmethod
    def _token(path):
        """Return what the file with the hub's token holds; raises AnsibleActionFail."""
        try:
            return path.read_text(encoding="utf-8").strip()
        except OSError as e:
            raise AnsibleActionFail(f"rbee_hub_token_file: {path}: {e.strerror}; next: correct it, or set HF_TOKEN") from e

    def _follow(self, process, progress):
        """Show lines until the process has ended; returns the last one."""
        seen, said, last = 0, 0.0, {}
        try:
            while True:
                over = process.poll() is not None
                lines = progress.read_text(encoding="utf-8").split("\n")[:-1] if progress.is_file() else []
                for line in (json.loads(text) for text in lines[seen:]):
                    last = line
                    often = line["stage"] in ("downloading", "verifying")
                    if line["stage"] != "failed" and (not often or time.monotonic() - said >= SAY_EVERY_S):
                        said = time.monotonic() if often else said
                        display.display(f"rbee: controller: {line['human']}")
                seen = len(lines)
                if over:
                    return last
                time.sleep(0.1)
        finally:
            if process.poll() is None:  # what has come is kept for the next time
                process.terminate()
                process.wait()

    def _result(self, args, last, code, words):
        if code == 0 and last.get("stage") == "complete":
            model = last["model"]
            files = [f["path"] for f in model.get("files") or [model]]
            return {"changed": bool(last["downloaded"]), "model": model, "files": files}
        error = {key: last.get(key) for key in ("code", "message", "hint", "details")}
        if last.get("stage") != "failed":
            message = f"the download of {args['ref']} on the controller ended with exit code {code}: {' '.join(words)}"
            error = {"code": "DOWNLOAD_FAILED", "message": message, "hint": "repeat the command", "details": {}}
        msg = f"{error['message']} [{error['code']}]" + (f"; next: {error['hint']}" if error["hint"] else "")
        return {"failed": True, "changed": False, "msg": msg, "rbee_error": error}
