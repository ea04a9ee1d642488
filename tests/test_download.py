"""download.py without a server: messages and hashes. With one: test_publish.py."""
import hashlib

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from timm_cgh.download import hub_reason, redact, split_hub_name, verify


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
    assert redact(text) == text


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
