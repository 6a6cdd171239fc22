"""The model hub: which file, how large, which digest, and its bytes from an offset on.

Repository data, addresses and headers come from huggingface_hub. The bytes do not go through its ``http_get``: that
retries by its own rules (five more each time a byte arrived, one second between) and tells nobody, so six tries with
SPEC 3.8's pauses, the stall limit and true progress could not be kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from rbee_serve.contract.errors import DownloadFailed, ModelAccessDenied, ModelNotFound, RbeeError
from rbee_serve.models.catalog import choose_file
from rbee_serve.models.store import ModelRef

_CONNECT_TIMEOUT_S = 10.0
_RETRY_STATUS = (408, 416, 425, 429)


class TransientError(Exception):
    """Worth another try. ``stalled``: nothing came for the whole stall limit. ``restart``: what is there is of no use."""

    def __init__(self, message: str, *, stalled: bool = False, restart: bool = False) -> None:
        super().__init__(message)
        self.stalled, self.restart = stalled, restart


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit, so that a push between two tries cannot mix two versions."""

    name: str
    size_bytes: int
    sha256: str | None
    url: str


class Hub:
    """One hub with one account. All methods raise TransientError for what may pass, RbeeError for what will not."""

    def __init__(self, endpoint: str | None, token: str | None, *, stall_timeout_s: float) -> None:
        # token=False: never a token that happens to lie in a home directory.
        self._api = HfApi(endpoint=endpoint, token=token or False, library_name="rbee")
        self._headers = {**build_hf_headers(token=token or False, library_name="rbee"), "Accept-Encoding": "identity"}
        self._stall_timeout_s = stall_timeout_s
        self._http = httpx.Client(
            follow_redirects=True,  # the hub answers with the address of its CDN; httpx drops the token on the way
            timeout=httpx.Timeout(_CONNECT_TIMEOUT_S, read=stall_timeout_s),
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def resolve(self, ref: ModelRef) -> RemoteFile:
        """Return the file that ``ref`` means; raises ModelNotFound, ModelAccessDenied, InvalidModelRef."""
        try:
            info = self._api.model_info(ref.repo_id, files_metadata=True, timeout=self._stall_timeout_s)
        except HfHubHTTPError as e:
            raise self._status_error(e.response.status_code, ref.repo_id) from e
        except RbeeError:
            raise
        except Exception as e:  # of whichever HTTP library this huggingface_hub is built on
            stalled = "Timeout" in type(e).__name__
            raise TransientError(f"{self._api.endpoint}: {type(e).__name__}: {e}", stalled=stalled) from e
        siblings = {s.rfilename: s for s in info.siblings or []}
        name = choose_file(ref, list(siblings))
        file = siblings[name]
        if file.size is None:
            raise DownloadFailed(f"{self._api.endpoint} does not tell the size of {ref.repo_id}/{name}", repo=ref.repo_id)
        sha256 = file.lfs.sha256 if file.lfs else None
        url = hf_hub_url(ref.repo_id, name, revision=info.sha or "main", endpoint=self._api.endpoint)
        return RemoteFile(name, file.size, sha256, url)

    @contextmanager
    def stream(self, file: RemoteFile, offset: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Open the file at ``offset``: yields where the bytes really begin (0 if the hub ignores ranges) and the bytes."""
        headers = {**self._headers, **({"Range": f"bytes={offset}-"} if offset else {})}
        try:
            with self._http.stream("GET", file.url, headers=headers) as response:
                if response.status_code not in (200, 206):
                    raise self._status_error(response.status_code, file.name)
                start = 0
                if response.status_code == 206:
                    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
                    start = int(match[1]) if match else -1
                    if start != offset:
                        raise TransientError(f"asked for bytes from {offset}, got {response.headers.get('Content-Range')}")
                yield start, response.iter_raw()
        except httpx.TimeoutException as e:
            limit = _CONNECT_TIMEOUT_S if isinstance(e, httpx.ConnectTimeout) else self._stall_timeout_s
            raise TransientError(f"no bytes for {limit:g} s", stalled=True) from e
        except httpx.HTTPError as e:
            raise TransientError(f"{type(e).__name__}: {e}") from e

    def _status_error(self, status: int, what: str) -> Exception:
        if status in _RETRY_STATUS or status >= 500:
            return TransientError(f"the hub answers HTTP {status}", restart=status == 416)
        hub = self._api.endpoint
        if status in (401, 403):
            return ModelAccessDenied(
                f"{what}: the hub answers HTTP {status}: private, gated, or misspelt",
                hint="accept the model's licence on the hub, then set HF_TOKEN to a token that may read it",
                hub=hub,
                http_status=status,
            )
        if status == 404:
            return ModelNotFound(
                f"{what}: the hub answers HTTP 404: no such repository or file",
                hint=f"look it up on the hub: {hub}/models?library=gguf",
                hub=hub,
                http_status=status,
            )
        return DownloadFailed(f"{what}: the hub answers HTTP {status}", hub=hub, http_status=status)
