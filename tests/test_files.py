import os
import stat

import pytest

from input_errors import refused
from run_folders import record_disk_calls
from timm_cgh.files import atomic_path, atomic_write, read_json, read_rows, read_yaml, write_yaml


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


def test_content_is_on_the_disk_before_it_takes_the_place_of_the_old(tmp_path, monkeypatch):
    calls = record_disk_calls(monkeypatch)
    with atomic_write(tmp_path / 'file') as file:
        file.write('new')
    inode = os.stat(tmp_path / 'file').st_ino
    assert calls == [('fsync', inode), ('replace', inode)]


@pytest.mark.skipif(os.name != 'posix', reason='permissions of POSIX')
def test_written_files_have_the_users_permissions(tmp_path):
    old = os.umask(0o022)
    try:
        with atomic_write(tmp_path / 'a') as file:
            file.write('a')
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / 'a').stat().st_mode) == 0o644


DEEP = '[' * 10 ** 5
BOMB = 'a: &a [x, x]\n' + ''.join(f'{b}: &{b} [*{a}, *{a}]\n' for a, b in zip('abcdefgh', 'bcdefghi'))


@pytest.mark.parametrize('read, content, part', [
    (read_yaml, b'a: [', 'expected'),
    (read_yaml, b'- a', 'values by name'),
    (read_yaml, b'1: a', 'values by name'),
    (read_yaml, b'a: \xff', 'utf-8'),
    (read_yaml, b'a: \0', 'special characters'),
    (read_yaml, b'a: !!python/object/apply:os.getcwd []', 'constructor'),
    (read_yaml, b'a: !!timestamp x', ''),
    (read_yaml, b'a: !!int ""', ''),
    (read_yaml, b'a: 2024-99-99', 'month'),
    (read_yaml, b'a: ' + b'9' * 5000, 'digits'),
    (read_yaml, DEEP.encode(), 'recursion'),
    (read_yaml, BOMB.encode(), 'aliases (*name) are not supported'),
    (read_json, b'', ''),
    (read_json, b'[1]', 'values by name'),
    (read_json, b'{"a": \xff}', 'utf-8'),
    (read_json, DEEP.encode(), 'recursion'),
    (read_rows, b'loss\n1\n', 'row 1'),
    (read_rows, b'epoch,loss\n0,1\n1\n', 'row 2'),
    (read_rows, b'epoch,loss\n0,1,2\n', 'row 1'),
    (read_rows, b'epoch,loss\n0,many\n', 'row 1'),
    (read_rows, b'epoch,loss\n-1,1\n', 'row 1'),
    (read_rows, b'epoch,loss\n1.5,1\n', 'row 1'),
    (read_rows, b'epoch,loss\n' + b'9' * 5000 + b',1\n', 'row 1'),
    (read_rows, b'epoch,loss\n0,"' + b'1' * 200000 + b'"\n', 'row 1'),
    (read_rows, b'epoch,loss\n\xff,1\n', 'row 1'),
    (read_rows, b'epoch,loss\n\0,1\n', 'row 1'),
])
def test_damaged_files_are_one_short_line_that_names_them(tmp_path, read, content, part):
    (tmp_path / 'file').write_bytes(content)
    with refused(tmp_path / 'file', part) as caught:
        read(tmp_path / 'file')
    assert len(str(caught.value)) < 500
    if read is not read_rows:
        with refused(tmp_path / 'none', 'No such file'):
            read(tmp_path / 'none')


def test_blank_values_and_an_absent_table_are_fine(tmp_path):
    assert read_rows(tmp_path / 'none') == []
    (tmp_path / 'file').write_text('epoch,loss,knn\n0,nan,\n1,1e400,2.5\n')
    assert [row['knn'] for row in read_rows(tmp_path / 'file')] == ['', '2.5']


def test_yaml_that_is_written_can_be_read(tmp_path):
    shared = [0.5, 0.5]
    write_yaml(tmp_path / 'a.yaml', {'mean': shared, 'options': {'mean': shared, 'size': (3, 32)}})
    assert read_yaml(tmp_path / 'a.yaml') == {'mean': shared, 'options': {'mean': shared, 'size': [3, 32]}}
