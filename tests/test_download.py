"""download.py without a server: messages and hashes. With one: test_publish.py."""
import contextlib
import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from timm_cgh import download
from timm_cgh.download import fetch, hub_reason, redact_token, split_hub_name, verify


def raised(error, cause):
    try:
        raise error from cause
    except Exception as caught:
        return caught


@pytest.mark.parametrize('cause, explanation', [
    (ConnectionRefusedError(111, 'refused'), 'not in the cache, and the Hub cannot be reached (network, HF_ENDPOINT)'),
    (OfflineModeIsEnabled('no'), 'not in the cache, and HF_HUB_OFFLINE allows no download'),
])
def test_reason_for_a_missing_file_is_the_cause_of_the_clients_error(cause, explanation):
    assert hub_reason(raised(LocalEntryNotFoundError('many\nlines'), cause)) == explanation


def test_other_errors_are_one_line_without_the_token(monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'not-of-the-usual-form')
    error = ValueError("Illegal header value b'Bearer not-of-the-usual-form'\nor hf_abcdefghijklmnopqrstu")
    assert hub_reason(error) == "Illegal header value b'Bearer <token>' or <token>"
    assert hub_reason(RuntimeError()) == 'RuntimeError'


def test_names_that_only_begin_like_a_token_are_kept():
    text = 'hf_hub_id hf_hub_download hf-hub:me/hf_models'
    assert redact_token(text) == text


@pytest.mark.parametrize('name, parts', [
    ('hf-hub:me/name', ('me/name', None)), ('me/name@v1', ('me/name', 'v1')), ('hf-hub:me/name@', ('me/name', None)),
])
def test_hub_names_are_those_of_timm(name, parts):
    assert split_hub_name(name) == parts


def test_files_are_verified_by_sha256_and_by_gits_hash(tmp_path):
    (tmp_path / 'file').write_bytes(b'what is up, doc?')
    verify(tmp_path / 'file', hashlib.sha256(b'what is up, doc?').hexdigest())
    verify(tmp_path / 'file', 'bd9dbf5aae1a3862dd1526723246b20206e5fc37')  # the example of the Pro Git book
    for wrong in ('0' * 64, '0' * 40):
        with pytest.raises(RuntimeError, match='its hash is'):
            verify(tmp_path / 'file', wrong)


# ---- a server that is no Hub

CONTENT = b'{"architecture": "resnet18"}'
GIT_HASH = hashlib.sha1(b'blob %d\0' % len(CONTENT) + CONTENT).hexdigest()


class Odd(BaseHTTPRequestHandler):
    """Answers every request with `CONTENT`, under any ETag, at any pace."""
    etag, body, seconds_per_byte = GIT_HASH, CONTENT, 0.0

    def do_GET(self):
        self.send_response(200)
        for name, value in (
                ('ETag', f'"{self.etag}"'), ('X-Repo-Commit', 'c' * 40), ('Content-Length', len(self.body))):
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == 'GET':
            with contextlib.suppress(OSError):
                for byte in self.body:
                    self.wfile.write(bytes([byte]))
                    time.sleep(self.seconds_per_byte)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def odd(monkeypatch):
    """`odd(**attributes)` sets how the server behaves."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (Odd,), {}))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f'http://127.0.0.1:{server.server_address[1]}'
    for name, value in (
            ('ENDPOINT', url), ('HUGGINGFACE_CO_URL_TEMPLATE', f'{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}'),
            ('HF_HUB_OFFLINE', False)):
        monkeypatch.setattr(constants, name, value)
    yield lambda **attributes: [setattr(server.RequestHandlerClass, *item) for item in attributes.items()]
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize('etag', ['../../../escaped', '..', '/tmp/escaped', 'no-hash', GIT_HASH + '/../x', ''])
def test_what_is_no_hash_names_no_file(odd, tmp_path, etag):
    odd(etag=etag)
    with pytest.raises(RuntimeError, match=r'^me/name, config\.json: '):
        fetch('me/name', 'config.json', cache_dir=tmp_path / 'a' / 'b' / 'cache')
    assert not [path for path in tmp_path.rglob('*') if path.is_file() and CONTENT in path.read_bytes()]
    assert not list(tmp_path.rglob('*escaped*'))


def test_content_is_verified_against_the_announced_hash_also_without_links(odd, tmp_path, monkeypatch):
    path = fetch('me/name', 'config.json', cache_dir=tmp_path / 'first')
    with open(path, 'rb') as file:
        assert file.read() == CONTENT
    odd(body=CONTENT[:-1] + b' ')
    monkeypatch.setattr('huggingface_hub.file_download.are_symlinks_supported', lambda *_: False)
    with pytest.raises(RuntimeError, match=r'its hash is .* removed from the cache'):
        fetch('me/name', 'config.json', cache_dir=tmp_path / 'second')
    assert not list((tmp_path / 'second').rglob('config.json'))


@pytest.mark.parametrize('seconds', [0.5, 30])  # dripping, silent
def test_a_slow_server_is_given_up(odd, tmp_path, monkeypatch, seconds):
    odd(seconds_per_byte=seconds)
    monkeypatch.setattr(download, '_PATIENCE', 1)
    with pytest.raises(RuntimeError, match=r'me/name, config\.json: not there after \d+ s'):
        fetch('me/name', 'config.json', cache_dir=tmp_path)
