"""Files that are written whole, whatever stands where they are to be."""

import json
import os
import subprocess
import sys
import threading

import pytest

from gqa_t5x import files
from gqa_t5x.errors import BadInput


@pytest.mark.parametrize('there', [True, False])
def test_a_link_stays_and_its_file_is_written(tmp_path, there):
  (tmp_path / 'disk').mkdir()
  file, link, second = (tmp_path / name for name in ('disk/rows', 'link', 'second'))
  link.symlink_to('disk/rows')
  second.symlink_to('link')
  if there:
    file.write_text('old')
  files.check_outputs(str(second))
  files.write_json(second, [1])
  assert link.is_symlink()
  assert second.is_symlink()
  assert json.loads(file.read_text()) == [1]
  assert [path.name for path in file.parent.iterdir()] == ['rows']


def test_a_link_stays_if_the_writer_fails(tmp_path):
  link = tmp_path / 'link'
  link.symlink_to('rows')
  (tmp_path / 'rows').write_text('old')
  with pytest.raises(TypeError), files.whole(link) as temporary:
    temporary.write_text(None)
  assert link.read_text() == 'old'
  assert len([*tmp_path.iterdir()]) == 2


def test_a_pipe_gets_the_bytes_at_the_end(tmp_path):
  pipe, got = tmp_path / 'pipe.json', []
  os.mkfifo(pipe)
  reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
  reader.start()
  with files.whole(pipe) as temporary:
    assert temporary.suffix == '.json'
    temporary.write_text('one')
    temporary.write_text('two')
  reader.join(30)
  assert got == ['two']
  assert pipe.is_fifo()
  assert [*tmp_path.iterdir()] == [pipe]


def test_a_device_stays_and_its_errors_name_it():
  files.write_text('/dev/null', 'x')
  with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
    files.write_text('/dev/full', 'x')
  assert all(files.is_stream(path) for path in ('/dev/null', '/dev/full'))


@pytest.mark.parametrize('name', ['/dev/stdout', 'out.txt', '/dev/fd/1'])
def test_standard_output_that_is_a_file_keeps_what_is_printed(tmp_path, name):
  program = 'import sys; from gqa_t5x import files; print("before");'
  program += 'files.write_text(sys.argv[1], "text\\n"); print("after")'
  with (tmp_path / 'out.txt').open('w') as out:
    environment = os.environ | {'PYTHONPATH': os.getcwd()}
    command = [sys.executable, '-c', program, name]
    subprocess.run(command, stdout=out, check=True, cwd=tmp_path, env=environment)
  assert (tmp_path / 'out.txt').read_text() == 'before\ntext\nafter\n'
  assert [path.name for path in tmp_path.iterdir()] == ['out.txt']


@pytest.mark.parametrize(
  ('path', 'said'),
  [
    ('', "'' is empty; name a file."),
    ('folder', "'folder' is a folder; name a file."),
    ('to_folder', "'to_folder' is a folder; name a file."),
    ('missing/x', 'missing/x: there is no such folder.'),
    ('to_missing', 'to_missing: there is no such folder.'),
    ('file/x', 'file/x: there is no such folder.'),
  ],
)
def test_what_cannot_be_written_is_refused_before(tmp_path, monkeypatch, path, said):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'folder').mkdir()
  (tmp_path / 'file').touch()
  (tmp_path / 'to_folder').symlink_to('folder')
  (tmp_path / 'to_missing').symlink_to('missing/x')
  with pytest.raises(BadInput) as caught:
    files.check_outputs(None, 'gs://bucket/x', path)
  assert str(caught.value) == said


def test_folders_that_will_be_made(tmp_path):
  files.check_outputs(f'{tmp_path}/a/b/x', make_folders=True)
  assert [*tmp_path.iterdir()] == []
  (tmp_path / 'file').touch()
  with pytest.raises(BadInput, match='there is no such folder'):
    files.check_outputs(f'{tmp_path}/file/b/x', make_folders=True)


def test_a_folder_without_permission(tmp_path, monkeypatch):
  monkeypatch.setattr(os, 'access', lambda path, mode: path != str(tmp_path))
  with pytest.raises(BadInput, match=f'x: no permission to write to {tmp_path}'):
    files.check_outputs(f'{tmp_path}/x')
