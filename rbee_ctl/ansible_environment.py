"""The environment of Ansible's programs: named variables and RBEE_*, never the caller's whole one."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from rbee_ctl import content
from rbee_serve import __version__

#: What ansible-playbook sees of the caller's environment. RBEE_* comes on top.
_PASSED = ("HOME", "USER", "LOGNAME", "SHELL", "TERM", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "SSH_AUTH_SOCK")
_PASSED_SECRET = ("HF_TOKEN",)
_PASSED_HUB = ("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
#: Where the passwords of the user's vaults come from.
_PASSED_VAULT = ("ANSIBLE_VAULT_PASSWORD_FILE", "ANSIBLE_VAULT_IDENTITY_LIST", "ANSIBLE_VAULT_IDENTITY")


def environment(environ: Mapping[str, str] | None = None, state_dir: Path | None = None) -> dict[str, str]:
    """Return the environment for Ansible's programs: named variables and RBEE_*, with our own ``bin`` first on PATH."""
    environ = os.environ if environ is None else environ
    passed = {k: environ[k] for k in (*_PASSED, *_PASSED_SECRET, *_PASSED_HUB, *_PASSED_VAULT) if k in environ}
    if file := passed.get("ANSIBLE_VAULT_PASSWORD_FILE"):  # Ansible runs in another folder
        passed["ANSIBLE_VAULT_PASSWORD_FILE"] = str(Path(file).expanduser().absolute())
    passed |= {k: v for k, v in environ.items() if k.startswith("RBEE_")}
    bin_dir = str(Path(sys.executable).parent)
    passed["PATH"] = f"{bin_dir}:{environ.get('PATH') or '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'}"
    if (cfg := content.ansible_cfg()) is not None:
        passed["ANSIBLE_CONFIG"] = str(cfg)
    passed["RBEE_CONTROLLER_VERSION"] = __version__  # a machine that has another one takes no new worker (SPEC S-19)
    if state_dir is not None:
        passed["RBEE_STATE_DIR"] = str(state_dir)
    return passed


def of_run(private: Path) -> dict[str, str]:
    """Return what a run with the folder ``private`` has besides: no colours, scratch files where they are sure to be removed."""
    return {"ANSIBLE_LOCAL_TEMP": str(private / "tmp"), "ANSIBLE_FORCE_COLOR": "0", "ANSIBLE_NOCOLOR": "1"}
