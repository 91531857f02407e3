"""The hub as a source, through huggingface_hub: its endpoint or mirror (HF_ENDPOINT), its token, its proxies and certificates.

Listing and errors are the library's own calls. Bytes come by ranged requests on its session, for the library itself fetches
whole files only.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi, ModelInfo, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, close_session, get_session, hf_raise_for_status

from exo_kimi.errors import FetchError, HubUnreachableError, TensorFileError
from exo_kimi.fetch.source import Listing, RemoteFile, TryAgainError, is_wanted

LISTING_S = 30.0
LISTING_TRIES = 3
MOST_LISTING_WAIT_S = 60.0  # a hub that asks for more is left alone, and the user told
SILENCE_S = 30.0  # of a connection that has begun to answer
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_MOST_RESET_S = 3600


class HubSource:
    """A model on the hub at one commit.

    Args:
        model: ORG/NAME.
        revision: branch, tag or commit; the default branch when not given.
        endpoint: URL of the hub; HF_ENDPOINT's, or the library's own, when not given.
    """

    def __init__(self, model: str, *, revision: str | None = None, endpoint: str | None = None) -> None:
        self.model = model
        self.endpoint = endpoint or constants.ENDPOINT
        self._revision = revision
        self._commit: str | None = None

    def listing(self) -> Listing:
        """The files of the newest commit, or of the revision that was asked for.

        Raises:
            HubUnreachableError: no connection, or HF_HUB_OFFLINE.
            FetchError: no such model, no access, or a hub that will not answer.
        """
        with self._named_errors():
            try:
                info = self._model_info()
            except self._client_error as error:
                raise HubUnreachableError(
                    f"the hub cannot be reached for {self.model}",
                    found=_one_line(error),
                    where=self.endpoint,
                    fix="check the connection; HF_ENDPOINT names a mirror by its URL, https:// and all",
                ) from error
        if not info.sha:
            raise FetchError("the hub names no commit of the model", where=f"{self.endpoint}/{self.model}")
        self._commit = info.sha
        files = {}
        for sibling in info.siblings or ():
            name, lfs = sibling.rfilename, sibling.lfs
            if not is_wanted(name):
                continue
            size = (lfs.size if lfs is not None else None) or sibling.size
            if size is None or size < 0:
                raise FetchError(f"the hub does not say how large {name} is", where=f"{self.endpoint}/{self.model}")
            sha256 = lfs.sha256 if lfs is not None else None
            files[name] = RemoteFile(name=name, size=size, sha256=sha256, git_sha1=None if sha256 else sibling.blob_id)
        return Listing(model=self.model, revision=info.sha, files=files, where=self.endpoint)

    def _model_info(self) -> ModelInfo:
        """Asked again where the hub says for how many seconds it wants to be left alone."""
        for attempt in range(1, LISTING_TRIES + 1):
            try:
                return HfApi(endpoint=self.endpoint).model_info(
                    self.model, revision=self._revision, files_metadata=True, timeout=LISTING_S
                )
            except HfHubHTTPError as error:
                wait_s = _wait_s(error.response.headers) if _status(error) in _TRY_AGAIN else None
                if wait_s is None or wait_s > MOST_LISTING_WAIT_S or attempt == LISTING_TRIES:
                    raise
            time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    def read(self, file: RemoteFile, start: int, end: int) -> Iterator[bytes]:
        """The bytes [start, end) of a file.

        Raises:
            TryAgainError: no connection, a break, too many requests, or a fault of the server.
            FetchError: no access, no such file, or a server without ranges.
        """
        url = hf_hub_url(self.model, file.name, revision=self._commit, endpoint=self.endpoint)
        headers = build_hf_headers(library_name="exo-kimi")
        headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        with self._named_errors():
            try:
                with get_session().stream(
                    "GET", url, headers=headers, follow_redirects=True, timeout=SILENCE_S
                ) as response:
                    if response.status_code in _TRY_AGAIN:
                        raise TryAgainError(_status_words(response.status_code), wait_s=_wait_s(response.headers))
                    hf_raise_for_status(response)
                    _check_range(response, file, start, end, self.endpoint)
                    left = end - start
                    for piece in response.iter_raw():
                        if len(piece) > left:
                            raise FetchError(
                                f"the hub sent more of {file.name} than was asked for", where=self.endpoint
                            )
                        left -= len(piece)
                        yield piece
                    if left:
                        raise TryAgainError("the connection ended early")
            except self._client_error as error:
                raise TryAgainError(_one_line(error)) from error

    def digest(self, file: RemoteFile, ranges: tuple[tuple[int, int], ...]) -> str | None:
        """The hub knows hashes of whole files only."""
        return file.sha256 if ranges == ((0, file.size),) else None

    def close(self) -> None:
        """Close the library's session; it opens another when one is needed."""
        close_session()

    @property
    def _client_error(self) -> type[Exception]:
        """Base of the connection errors of the session: httpx's, or since huggingface_hub 2 those of its httpx2."""
        client = importlib.import_module(type(get_session()).__module__.partition(".")[0])
        error: type[Exception] = client.TransportError
        return error

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        where = f"{self.endpoint}/{self.model}"
        try:
            yield
        except GatedRepoError as error:
            raise FetchError(
                f"access to {self.model} must be asked for",
                found=_status_words(_status(error)),
                where=where,
                fix="accept its terms on the model's page, then `hf auth login`, or put a token into HF_TOKEN",
            ) from error
        except RepositoryNotFoundError as error:
            raise FetchError(
                f"no model {self.model} at the hub, or it is private",
                found=_status_words(_status(error)),
                where=where,
                fix="check the name; for a private one `hf auth login`, or put a token into HF_TOKEN",
            ) from error
        except RevisionNotFoundError as error:
            raise FetchError(
                f"{self.model} has no revision {self._revision}",
                where=where,
                fix="give a branch, a tag or a commit of it with --revision",
            ) from error
        except OfflineModeIsEnabled as error:
            raise HubUnreachableError(
                "the hub is switched off by HF_HUB_OFFLINE", where=where, fix="unset it"
            ) from error
        except HfHubHTTPError as error:
            status, asked_s = _status(error), _wait_s(error.response.headers)
            wait = "some minutes" if asked_s is None else f"{asked_s:.0f} s, as it asks for,"
            fix = {
                401: "`hf auth login`, or put a token into HF_TOKEN",
                403: "the token has no right to this model: accept its terms on the model's page, or use another token",
                429: f"wait {wait} and run the same command again: it goes on where it was",
            }.get(status, "run the same command again later: it goes on where it was")
            raise FetchError("the hub refused", found=_status_words(status), where=where, fix=fix) from error


def _check_range(response: Any, file: RemoteFile, start: int, end: int, where: str) -> None:
    whole = response.status_code == 200 and start == 0 and end == file.size
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise FetchError(f"{file.name} came compressed", where=where, fix="use another mirror")
    if whole:
        length = response.headers.get("Content-Length")
        if length is not None and length != str(file.size):
            raise _other_size(file, length, where)
        return
    if response.status_code != 206 or found is None:
        raise FetchError(
            "the server does not give parts of files",
            expected=f"status 206 with bytes {start}-{end - 1}",
            found=_status_words(response.status_code),
            where=where,
            fix="use another mirror (HF_ENDPOINT)",
        )
    if int(found[3]) != file.size:
        raise _other_size(file, found[3], where)
    if (int(found[1]), int(found[2])) != (start, end - 1):
        raise TryAgainError(f"another range came than was asked for: {found[0]}")


def _other_size(file: RemoteFile, found: str, where: str) -> TensorFileError:
    return TensorFileError(
        f"{file.name} has another size than the hub's list says",
        expected=f"{file.size:,} bytes",
        found=f"{found} bytes",
        where=where,
        fix="use another mirror, or try again when the upload is complete",
    )


def _status(error: Any) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _status_words(status: int) -> str:
    words = {
        401: "not logged in",
        403: "forbidden",
        404: "not found",
        429: "too many requests",
        500: "an error of the server",
        502: "bad gateway",
        503: "not available",
        504: "the server's own time was up",
    }
    return f"status {status}" + (f" ({words[status]})" if status in words else "")


def _wait_s(headers: Any) -> float | None:
    """Seconds that the hub asks to wait: `Retry-After`, or `t=` of its `RateLimit`."""
    after = headers.get("Retry-After", "")
    reset = re.search(r"(?:^|;)\s*t=(\d+)", headers.get("RateLimit", ""))
    found = after if after.isdecimal() else reset[1] if reset else ""
    return min(float(found), _MOST_RESET_S) if found else None


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
