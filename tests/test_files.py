import os
import stat

import pytest

from timm_cgh.files import atomic_path, atomic_write


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text('old')
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write('half of the n')
        file.flush()
        assert path.read_text() == 'old'  # what a reader sees meanwhile
        raise KeyError
    assert path.read_text() == 'old'
    assert os.listdir(tmp_path) == ['a.txt']


def test_files_are_written_as_text_as_bytes_and_by_name(tmp_path):
    with atomic_write(tmp_path / 'text') as file:
        file.write('größer\r\n')
    with atomic_write(tmp_path / 'bytes', 'wb') as file:
        file.write(b'\x00\x01')
    with atomic_path(tmp_path / 'named') as temp:
        temp.write_bytes(b'named')
    assert (tmp_path / 'text').read_bytes() == 'größer\r\n'.encode()
    assert (tmp_path / 'bytes').read_bytes() == b'\x00\x01'
    assert sorted(os.listdir(tmp_path)) == ['bytes', 'named', 'text']
    with pytest.raises(ValueError, match="'a'"), atomic_write(tmp_path / 'text', 'a'):
        pass


@pytest.mark.skipif(os.name != 'posix', reason='permissions of POSIX')
def test_written_files_have_the_users_permissions(tmp_path):
    old = os.umask(0o022)
    try:
        with atomic_write(tmp_path / 'a') as file:
            file.write('a')
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / 'a').stat().st_mode) == 0o644
