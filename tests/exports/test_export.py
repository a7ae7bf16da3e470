"""The command: what it refuses, and that it leaves nothing behind."""

import numpy as np
import pytest

import gqa_t5x
from gqa_t5x import export
from gqa_t5x.command_line import Terminated
from gqa_t5x.exports import run
from helpers import exports, model_oracle, trees


@pytest.fixture
def source(tmp_path):
  return exports.checkpoint(tmp_path / 'run', model_oracle.config(2))


def test_unknown_format(source, tmp_path):
  said = exports.refused(source, tmp_path / 'out', 'onnx')
  assert said == f'--format=onnx is unknown; choose one of {", ".join(run.FORMATS)}'


def test_saved_model_is_of_t5x(source, tmp_path):
  said = exports.refused(source, tmp_path / 'out', 'saved_model')
  assert 'python -m t5x.export' in said


def test_option_of_another_format(source, tmp_path):
  said = exports.refused(source, tmp_path / 'out', 'stablehlo', quantization='int8')
  assert said == '--quantization is not for --format=stablehlo; leave it out'


def test_the_latent_form_is_not_ctranslate2s(tmp_path):
  cfg = model_oracle.config(2, kv_head_dim=5)
  source = exports.checkpoint(tmp_path / 'run', cfg)
  said = exports.refused(source, tmp_path / 'out', 'ctranslate2')
  assert 'is of the latent form, with key/value heads of 5 numbers, and' in said
  assert 'but of the head size, 6; choose --format=stablehlo, which keeps it' in said


@pytest.mark.parametrize('format', run.FORMATS)
def test_existing_output(format, source, tmp_path):
  output = tmp_path / 'out'
  output.mkdir()
  (output / 'precious').write_text('text')
  said = exports.refused(source, output, format)
  assert said == f'{output} exists already; choose another, or delete it'
  assert [file.name for file in output.iterdir()] == ['precious']


def test_output_in_a_bucket(source, tmp_path):
  with pytest.raises(run.BadInput, match='must be a local folder'):
    run.export(source, 'gs://bucket/out', 'ctranslate2')


def test_no_checkpoint(tmp_path):
  said = exports.refused(tmp_path / 'none', tmp_path / 'out', 'ctranslate2')
  assert said.startswith(f'there is no checkpoint at {tmp_path / "none"}')


@pytest.mark.parametrize('missing', ['input', 'output', 'format'])
def test_missing_flags(missing, tmp_path, capsys):
  flags = {'input': tmp_path, 'output': tmp_path / 'out', 'format': 'ctranslate2'}
  given = [f'--{name}={value}' for name, value in flags.items() if name != missing]
  assert export.main(['export', *given]) == 1
  assert f'error: --{missing} is missing' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('error', 'code'),
  [(OSError('No space left'), 1), (KeyboardInterrupt(), 130), (Terminated(), 143)],
)
def test_what_stops_an_export_leaves_nothing(
  error, code, source, tmp_path, monkeypatch, capsys
):
  def fail(source, folder):
    (folder / 'half').write_text('half of it')
    raise error

  monkeypatch.setitem(run.FORMATS, 'failing', fail)
  before = sorted(tmp_path.iterdir())
  flags = [f'--input={source}', f'--output={tmp_path / "out"}', '--format=failing']
  assert export.main(['export', *flags]) == code
  assert sorted(tmp_path.iterdir()) == before
  said = 'error: No space left' if code == 1 else 'stopped; nothing was written'
  assert capsys.readouterr().err == said + '\n'


@pytest.mark.parametrize('format', run.FORMATS)
def test_values_that_are_not_finite(format, tmp_path):
  if format == 'ctranslate2':
    pytest.importorskip('ctranslate2')
  tree = trees.tiny_state(2, moments=False)
  tree['target']['decoder']['layers_1']['mlp']['wo']['kernel'][2, 1] = np.inf
  source = trees.write_t5x(tmp_path / f'checkpoint_{trees.STEP}', tree)
  said = exports.refused(source, tmp_path / 'out', format)
  assert said.startswith(
    'decoder/layers_1/mlp/wo/kernel has 1 values that are not finite, of '
  )


def test_a_killed_export_is_written_over(source, tmp_path):
  left = tmp_path / 'out.tmp-convert'
  left.mkdir()
  (left / 'half').write_text('half of it')
  exports.command(source, tmp_path / 'out', 'huggingface')
  assert not left.exists()
  assert not (tmp_path / 'out' / 'half').exists()


@pytest.mark.parametrize('format', ['ctranslate2', 'huggingface', 't5x'])
@pytest.mark.parametrize('place', ['beside', 'given', 'none'])
def test_the_python_api_writes_what_the_command_does(format, place, source, tmp_path):
  if format == 'ctranslate2':
    pytest.importorskip('ctranslate2')
  options, flags = {}, []
  if place == 'beside':
    exports.write_spiece(source, extra_ids=4)
  if place == 'given' and format != 't5x':
    tokens = ['<pad>', '</s>', '<unk>', 'a']
    file = exports.write_tokenizer(tmp_path, tokens)
    options['vocabulary'] = str(file)
    flags = [f'--vocabulary={file}']
  gqa_t5x.load(source).export(tmp_path / 'here', format, **options)
  exports.command(source, tmp_path / 'there', format, *flags)
  there, here = (
    {f.relative_to(folder): f.read_bytes() for f in folder.rglob('*') if f.is_file()}
    for folder in (tmp_path / 'there', tmp_path / 'here')
  )
  assert here == there
