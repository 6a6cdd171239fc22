"""Where models come from: which files, how large, which digests, and their bytes from an offset on.

Repository data, addresses and headers come from huggingface_hub. The bytes do not go through its ``http_get``: that
retries by its own rules (five more each time a byte arrived, one second between) and tells nobody, so six tries with
SPEC 3.8's pauses, the stall limit and true progress could not be kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

import httpx
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from rbee_serve.contract.errors import DownloadFailed, InvalidModelRef, ModelAccessDenied, ModelNotFound, RbeeError
from rbee_serve.models.catalog import choose_files
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
    """A file at one version, so that a push between two tries cannot mix two versions."""

    name: str
    size_bytes: int
    sha256: str | None
    url: str
    origin: str | None = None  # where it came from in the first place, when ``url`` is a machine of the fleet


class Source:
    """Files on a web server. All methods raise TransientError for what may pass, RbeeError for what will not."""

    def __init__(self, *, stall_timeout_s: float, trust_env: bool = True) -> None:
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "rbee"}
        self._stall_timeout_s = stall_timeout_s
        self._http = httpx.Client(
            follow_redirects=True,  # a hub answers with the address of its CDN; httpx drops the token on the way
            timeout=httpx.Timeout(_CONNECT_TIMEOUT_S, read=stall_timeout_s),
            trust_env=trust_env,
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def resolve(self, ref: ModelRef) -> list[RemoteFile]:
        """Return the file that an ``https://...#sha256=`` reference means; raises ModelNotFound, ModelAccessDenied."""
        with self._answers(), self._http.stream("GET", ref.path, headers=self._headers) as response:
            if response.status_code != 200:
                raise self._status_error(response.status_code, ref.path)
            length = response.headers.get("Content-Length", "")
        if not length.isdigit():
            raise DownloadFailed(f"{ref.path}: the server does not tell the size", url=ref.path)
        return [RemoteFile(unquote(urlsplit(ref.path).path.rsplit("/", 1)[-1]), int(length), ref.file, ref.path)]

    @contextmanager
    def stream(self, file: RemoteFile, offset: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Open the file at ``offset``: yields where the bytes really begin (0 if ranges are ignored) and the bytes."""
        headers = {**self._headers, **({"Range": f"bytes={offset}-"} if offset else {})}
        with self._answers(), self._http.stream("GET", file.url, headers=headers) as response:
            if response.status_code not in (200, 206):
                raise self._status_error(response.status_code, file.name, response.headers.get("X-Error-Code", ""))
            start = 0
            if response.status_code == 206:
                match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
                start = int(match[1]) if match else -1
                if start != offset:
                    raise TransientError(f"asked for bytes from {offset}, got {response.headers.get('Content-Range')}")
            yield start, response.iter_raw()

    @contextmanager
    def _answers(self) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException as e:
            limit = _CONNECT_TIMEOUT_S if isinstance(e, httpx.ConnectTimeout) else self._stall_timeout_s
            raise TransientError(f"no bytes for {limit:g} s", stalled=True) from e
        except httpx.HTTPError as e:
            raise TransientError(f"{type(e).__name__}: {e}") from e

    def _status_error(self, status: int, what: str, reason: str = "") -> Exception:
        if status in _RETRY_STATUS or status >= 500:
            return TransientError(f"the server answers HTTP {status}", restart=status == 416)
        if status in (401, 403):
            return ModelAccessDenied(
                f"{what}: the server answers HTTP {status}", hint=self._access_hint(status), http_status=status
            )
        if status == 404:
            return ModelNotFound(
                f"{what}: the server answers HTTP 404: no such file", hint="check the address", http_status=status
            )
        return DownloadFailed(f"{what}: the server answers HTTP {status}", http_status=status)

    def _access_hint(self, status: int) -> str:
        return "use an address that needs no login"


class Hub(Source):
    """One model hub with one account."""

    def __init__(self, endpoint: str | None, token: str | None, *, stall_timeout_s: float) -> None:
        super().__init__(stall_timeout_s=stall_timeout_s)
        # token=False: never a token that happens to lie in a home directory.
        self._api = HfApi(endpoint=endpoint, token=token or False, library_name="rbee")
        self._headers = {**build_hf_headers(token=token or False, library_name="rbee"), "Accept-Encoding": "identity"}
        self._with_token = bool(token)
        self._repo = ""  # the one that was asked for

    def resolve(self, ref: ModelRef) -> list[RemoteFile]:
        """Return the files that ``ref`` means; raises ModelNotFound, ModelAccessDenied, InvalidModelRef."""
        self._repo = ref.repo_id
        try:
            info = self._api.model_info(ref.repo_id, files_metadata=True, timeout=self._stall_timeout_s)
        except HfHubHTTPError as e:
            raise self._status_error(e.response.status_code, ref.repo_id, e.response.headers.get("X-Error-Code", "")) from e
        except HFValidationError as e:
            raise InvalidModelRef(f"{ref.repo_id} is no name of a repository: {e}", hint="write hf:org/repo:file.gguf") from e
        except Exception as e:  # of whichever HTTP library this huggingface_hub is built on
            stalled = "Timeout" in type(e).__name__
            raise TransientError(f"{self._api.endpoint}: {type(e).__name__}: {e}", stalled=stalled) from e
        siblings = {s.rfilename: s for s in info.siblings or []}
        found = []
        for name in choose_files(ref, list(siblings)):
            file = siblings[name]
            if file.size is None:
                raise DownloadFailed(f"{self._api.endpoint} does not tell the size of {ref.repo_id}/{name}", repo=ref.repo_id)
            url = hf_hub_url(ref.repo_id, name, revision=info.sha or "main", endpoint=self._api.endpoint)
            found.append(RemoteFile(name, file.size, file.lfs.sha256 if file.lfs else None, url))
        return found

    def _status_error(self, status: int, what: str, reason: str = "") -> Exception:
        """Tell 401, 403 and 404 apart (SPEC S-23, S-24)."""
        hub = self._api.endpoint
        error: RbeeError
        if status == 401:
            said = "does not accept the token that was given" if self._with_token else "asks for a token"
            maybe = (
                "; the name may also be misspelt: hubs answer the same for what does not exist"
                if reason == "RepoNotFound"
                else ""
            )
            error = ModelAccessDenied(
                f"{what}: the hub {said} (HTTP 401){maybe}",
                hint="set HF_TOKEN to a token of an account that may read it, and repeat the command",
                hub=hub,
                http_status=status,
            )
        elif status == 403:
            whose = "the account of the token" if self._with_token else "without an account one"
            error = ModelAccessDenied(
                f"{what}: {whose} may not read it (HTTP 403{', gated' if reason == 'GatedRepo' else ''})",
                hint=f"accept the licence at {hub}/{self._repo or what}, then repeat with HF_TOKEN set to that account's token",
                hub=hub,
                http_status=status,
            )
        elif status == 404:
            error = ModelNotFound(
                f"{what}: the hub answers HTTP 404: no such repository or file",
                hint=f"look it up on the hub: {hub}/models?library=gguf",
                hub=hub,
                http_status=status,
            )
        else:
            return super()._status_error(status, what, reason)
        return error
