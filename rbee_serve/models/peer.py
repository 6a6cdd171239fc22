"""One model that another machine of the fleet has: what it is, and its bytes (share.py answers).

A model is fetched from the hub once; the other machines get it here, over the LAN, and need no hub. What comes is checked
like any download: the digests are those that the first machine checked against the hub's.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from rbee_serve.contract.errors import DownloadFailed
from rbee_serve.models.hub import RemoteFile, Source, TransientError
from rbee_serve.models.store import ModelRef


class Peer(Source):
    """A machine that shares one model at ``url``; ``token`` is the fleet's."""

    def __init__(self, url: str, token: str | None, *, stall_timeout_s: float) -> None:
        super().__init__(stall_timeout_s=stall_timeout_s, trust_env=False)  # a proxy is for the internet
        self._url = url.rstrip("/")
        if token:
            self._headers["Authorization"] = f"Bearer {token}"

    def reference(self) -> str:
        """Return the exact reference of the model that is shared; raises TransientError, RbeeError."""
        return str(self._described()["reference"])

    def resolve(self, ref: ModelRef) -> list[RemoteFile]:
        """Return the files of the model; ``ref`` is not looked at: one model is shared."""
        found = []
        described = self._described()
        origin = str(described.get("source_url") or "") or None
        for number, file in enumerate(described["files"]):
            name, size, sha256 = str(file["name"]), file["size_bytes"], file["sha256"]
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not name.endswith(".gguf") or not isinstance(size, int) or not sha256:
                raise DownloadFailed(f"{self._url} offers {name!r}, which is no model file", url=self._url)
            found.append(RemoteFile(name, size, str(sha256), f"{self._url}/v1/model/files/{number}", origin))
        return found

    def _described(self) -> dict[str, Any]:
        address = f"{self._url}/v1/model"
        with self._answers():
            response = self._http.get(address, headers=self._headers)
        if response.status_code != 200:
            raise self._status_error(response.status_code, address)
        try:
            described = response.json()
        except ValueError as e:
            raise TransientError(f"{address}: {e}") from e
        if not isinstance(described, dict) or not isinstance(described.get("files"), list) or not described.get("reference"):
            raise DownloadFailed(f"{address} does not describe a model", url=self._url)
        return described

    def _access_hint(self, status: int) -> str:
        return "the machines have different fleet tokens; bring them all up to date: ansible-playbook site.yml"
