"""Downloads from the Hugging Face Hub through its client's cache, verified; errors are one line without a token."""
import contextlib
import functools
import hashlib
import logging
import os
import re
import threading
import time
from pathlib import Path
from typing import Any, Optional, Tuple, Union

from huggingface_hub import get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError, GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled,
    RepositoryNotFoundError, RevisionNotFoundError)
from huggingface_hub.utils import get_session

__all__ = ['HUB_PREFIX', 'fetch', 'fetch_folder', 'hub_reason', 'redact_token', 'split_hub_name', 'verify']

HUB_PREFIX = 'hf-hub:'  # timm's
_HASH = r'[0-9a-f]{40}|[0-9a-f]{64}'  # git's of a blob, SHA-256
_PATIENCE = 60  # seconds for a download, to which comes the time for its bytes at the slowest rate, per second
_SLOWEST = 50_000
_ATTEMPTS = 4  # the client repeats a HEAD that fails with 5xx, but not the GET after it
_STATUS = {
    401: 'not logged in, or the token is invalid (HF_TOKEN, hf auth login)',
    403: 'the token does not permit this (403)',
    429: 'too many requests (429), try again later',
}


def redact_token(text: str) -> str:
    """Replace the Hub's token, and whatever looks like one, in a text."""
    with contextlib.suppress(Exception):  # the request itself reports a login that fails
        text = text.replace(get_token() or '<token>', '<token>')
    return re.sub(r'\bhf_[A-Za-z0-9]{16,}', '<token>', text)


def hub_reason(error: BaseException) -> str:
    """Explain an exception of the Hub's client or the network in one line."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)

    def first(*kinds: type) -> Any:
        return next((e for e in chain if isinstance(e, kinds)), None)

    answer = first(HfHubHTTPError)
    status = getattr(getattr(answer, 'response', None), 'status_code', 0)  # clients before 1.0 may set none
    if first(OfflineModeIsEnabled):
        words = 'not in the cache, and HF_HUB_OFFLINE allows no download'
    elif first(GatedRepoError, RepositoryNotFoundError):
        words = 'no such repository, or your token gives no access to it (HF_TOKEN, hf auth login)'
    elif first(RevisionNotFoundError):
        words = 'no such revision'
    elif status in _STATUS:
        words = _STATUS[status]
    elif status >= 500:
        words = f'the Hub is unavailable ({status}), try again later'
    elif answer is None and first(LocalEntryNotFoundError):
        words = 'not in the cache, and the Hub cannot be reached (network, HF_ENDPOINT)'
    else:
        words = ' '.join(str(error).split())[:200] or type(error).__name__
    message = ' '.join((answer.server_message or '').split()) if answer is not None and status < 500 else ''
    return redact_token(f'{words}: {message[:200]}' if message and message not in words else words)


def split_hub_name(name: str) -> Tuple[str, Optional[str]]:
    """`[hf-hub:]owner/name[@revision]` -> repository id and revision."""
    repo_id, _, revision = name.removeprefix(HUB_PREFIX).partition('@')
    return repo_id, revision or None


def verify(path: Union[str, Path], sha256: str) -> None:
    """Check the hash of a file: SHA-256, or git's blob hash if it has 40 digits.

    Raises:
        RuntimeError: it differs
    """
    digest = hashlib.sha256() if len(sha256) == 64 else hashlib.sha1(b'blob %d\0' % os.path.getsize(path))
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise RuntimeError(f'its hash is {digest.hexdigest()[:12]}..., not {sha256[:12]}... as published')


class _Download(threading.Thread):
    """One download by the Hub's client, in a thread of its own so that it can be given up.

    The client names its blobs by the ETag without looking at it: one that is no hash is refused before it is used.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(daemon=True)
        self.call = functools.partial(hf_hub_download, *args, **kwargs, library_name='timm-cgh')
        self.path, self.etag, self.size = '', '', 0
        self.error: Optional[BaseException] = None

    def run(self) -> None:
        session: Any = get_session()
        hooks = session.event_hooks if hasattr(session, 'event_hooks') else session.hooks  # httpx, requests
        try:
            hooks['response'].append(self._note)
            self.path = self.call()
        except BaseException as error:
            self.error = error
        finally:
            hooks['response'].remove(self._note)

    def _note(self, response: Any, *_: Any, **__: Any) -> None:
        if response.request.method != 'HEAD' or response.status_code not in (200, 302):
            return
        announced = response.headers.get('X-Linked-Etag') or response.headers.get('ETag')
        if announced:
            self.etag = announced.removeprefix('W/').strip('"')
            if not re.fullmatch(_HASH, self.etag):
                raise RuntimeError('the Hub announces no hash of it')
            size = response.headers.get('X-Linked-Size') or response.headers.get('Content-Length') or ''
            self.size = int(size) if size.isdecimal() else 0

    def result(self) -> str:
        """Path of the file; raises what the client raises, and `TimeoutError` after `_PATIENCE` and `_SLOWEST`."""
        self.start()
        began = time.monotonic()
        while self.is_alive():
            self.join(0.1)
            if (waited := time.monotonic() - began) > _PATIENCE + self.size / _SLOWEST:
                raise TimeoutError(f'not there after {waited:.0f} s')
        if self.error is not None:
            raise self.error
        return self.path


def fetch(
        repo_id: str,
        filename: str,
        revision: Optional[str] = None,
        sha256: Optional[str] = None,
        cache_dir: Optional[Union[str, Path]] = None,
) -> str:
    """A file of a model repository, from the client's cache or the Hub.

    `huggingface_hub` downloads, honours its environment (`HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`) and
    resumes interrupted downloads, but checks only the length of the content. Here the hash is checked too: the given
    one, else the one that the Hub announces or announced (the cache names its blobs by it, if it can use symbolic
    links). A file that fails is removed from the cache. A download ends after a minute and 20 s for each MB.

    Args:
        repo_id, filename: `owner/name`, and a name in that repository
        revision: branch, tag or commit; default main
        sha256: of the content, 64 hexadecimal digits
        cache_dir: default the client's

    Returns:
        path in the cache

    Raises:
        RuntimeError: unavailable, or not the published content; one line that names repository and file
    """
    for client in ('httpx', 'httpx2'):
        logging.getLogger(client).setLevel(logging.WARNING)  # at INFO they log the signed URLs of private files
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            download = _Download(repo_id, filename, revision=revision, cache_dir=cache_dir)
            path = download.result()
            break
        except Exception as error:  # the types depend on the client's version and its network library
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                raise RuntimeError(f'{repo_id} has no {filename}') from error
            status = getattr(getattr(error, 'response', None), 'status_code', 0)
            if status < 500 or attempt == _ATTEMPTS:
                raise RuntimeError(f'{repo_id}, {filename}: {hub_reason(error)}') from error
            time.sleep(2 ** (attempt - 1))
    # snapshots/<commit>/<filename> is a link to blobs/<hash>, which may be a link into a store shared by caches
    blob = os.path.join(os.path.dirname(path), os.readlink(path)) if os.path.islink(path) else path
    if expected := sha256 or download.etag or (re.fullmatch(_HASH, os.path.basename(blob)) or [None])[0]:
        try:
            verify(path, expected)
        except RuntimeError as error:
            for bad in {path, blob, os.path.realpath(path)}:
                with contextlib.suppress(OSError):  # removed by another process, or a read-only cache
                    os.unlink(bad)
            done = 'still in' if os.path.lexists(path) else 'removed from'
            raise RuntimeError(f'{repo_id}, {filename}: {error}; {done} the cache, try again') from error
    return path


def fetch_folder(
        name: str,
        sha256: Optional[str] = None,
        cache_dir: Optional[Union[str, Path]] = None,
) -> str:
    """Folder with the `config.json` and `model.safetensors` of a model in timm's hub format; see `fetch`.

    Args:
        name: see `split_hub_name`
        sha256: of `model.safetensors`
        cache_dir: default the client's

    Raises:
        RuntimeError: see `fetch`; also for a repository that has pickled weights only
    """
    repo_id, revision = split_hub_name(name)
    folder = os.path.dirname(fetch(repo_id, 'config.json', revision, cache_dir=cache_dir))
    commit = os.path.basename(folder)  # both files from one commit, whatever is pushed meanwhile
    fetch(repo_id, 'model.safetensors', commit, sha256, cache_dir)
    return folder
