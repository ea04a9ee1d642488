"""Words and hashes of the Hub's client, without any server; with one: test_publish.py."""
import hashlib

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from timm_cgh.download import hub_reason, redact, split_hub_name, verify


def raised(error, cause):
    try:
        raise error from cause
    except Exception as caught:
        return caught


@pytest.mark.parametrize('cause, said', [
    (ConnectionRefusedError(111, 'refused'), 'not in the cache, and the Hub cannot be reached (network, HF_ENDPOINT)'),
    (OfflineModeIsEnabled('no'), 'not in the cache, and HF_HUB_OFFLINE allows no download'),
])
def test_why_a_file_is_not_there_is_found_behind_the_clients_error(cause, said):
    assert hub_reason(raised(LocalEntryNotFoundError('many\nlines'), cause)) == said


def test_other_errors_are_one_line_without_the_token(monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'not-of-the-usual-form')
    error = ValueError("Illegal header value b'Bearer not-of-the-usual-form'\nor hf_abcdefghijklmnopqrstu")
    assert hub_reason(error) == "Illegal header value b'Bearer <token>' or <token>"
    assert hub_reason(RuntimeError()) == 'RuntimeError'


def test_names_that_only_begin_like_a_token_stay():
    text = 'hf_hub_id hf_hub_download hf-hub:me/hf_models'
    assert redact(text) == text


@pytest.mark.parametrize('name, parts', [
    ('hf-hub:me/name', ('me/name', None)), ('me/name@v1', ('me/name', 'v1')), ('hf-hub:me/name@', ('me/name', None)),
])
def test_names_of_the_hub_are_timms(name, parts):
    assert split_hub_name(name) == parts


def test_a_file_is_compared_with_sha256_and_gits_hash(tmp_path):
    (tmp_path / 'file').write_bytes(b'what is up, doc?')
    verify(tmp_path / 'file', hashlib.sha256(b'what is up, doc?').hexdigest())
    verify(tmp_path / 'file', 'bd9dbf5aae1a3862dd1526723246b20206e5fc37')  # the example of the Pro Git book
    for wrong in ('0' * 64, '0' * 40):
        with pytest.raises(RuntimeError, match='has the hash'):
            verify(tmp_path / 'file', wrong)
