"""python -m gqa_t5x.compare: a table of what fewer heads cost, on a user's texts."""

import json
import re

import numpy as np
import pytest

import gqa_t5x
from gqa_t5x import compare
from gqa_t5x.analysis import comparison
from helpers import tokenizers_made as made

KEYS = ('num_kv_heads', 'method', 'kv_head_dim')
pytestmark = pytest.mark.usefixtures('quick_compilation')

ROWS = [(8, '-', None)]
ROWS += [(K, method, None) for K in (1, 2) for method in ('mean', 'svd')]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = made.write_flan(tmp_path_factory.mktemp('compare') / 'flan', num_heads=8)
  texts = [f'{text} {i}' for i, text in enumerate(made.TEXTS)]
  (folder / 'texts.txt').write_text('\n'.join(texts))
  pairs = [json.dumps({'a': t, 'b': t[:9]}) for t in texts]
  (folder / 'pairs.jsonl').write_text('\n'.join(pairs))
  return folder


def run(folder, *flags, texts='texts.txt'):
  given = [f'--input={folder}', f'--texts={folder / texts}', *flags]
  return compare.main(['compare', *given])


def test_rows_are_those_of_the_api(folder, tmp_path, capsys):
  """Texts 1, 3, ... calibrate, the others are judged on."""
  file = tmp_path / 'rows.json'
  flags = ('--num_kv_heads=1,2,all', f'--json={file}', '--notime', '--chip=v5e')
  assert run(folder, *flags, '--input_length=32', '--output_length=16') == 0
  rows = json.loads(file.read_text())['rows']
  assert [comparison.Choice(*map(row.get, KEYS)) for row in rows] == ROWS
  model = gqa_t5x.load(folder)
  texts = (folder / 'texts.txt').read_text().split('\n')
  judged = model.examples(texts[1::2])
  for row in rows:
    one, K = model, row['num_kv_heads']
    if K != 8:
      calibration = texts[::2] if row['method'] == 'svd' else None
      one = model.convert(K, row['method'], calibration)
    expected = one.evaluate(judged)
    assert row['tokens'] == expected['tokens'] > 20
    np.testing.assert_allclose(row['loss'], expected['loss'], rtol=1e-4)
    np.testing.assert_allclose(
      row['loss_increase'], row['loss'] - rows[0]['loss'], atol=1e-6
    )
    # Two layers of keys and values of K heads of 4, in bfloat16.
    per_token = 2 * 2 * K * 4 * 2
    assert row['cache_bytes_per_input_token'] == per_token
    room = 15.75 * 2**30 - 2 * model.num_parameters
    assert row['largest_batch'] == pytest.approx(room / (48 * per_token), rel=0.01)
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 1 + 1 + len(ROWS) + 2
  assert lines[-1].startswith('Take K = ') or 'None is within' in lines[-1]


def test_pairs_and_times(folder, tmp_path):
  file = tmp_path / 'rows.json'
  flags = ('--keys=a,b', '--num_kv_heads=2', '--methods=mean', f'--json={file}')
  small = ('--input_length=16', '--output_length=32', '--batch_size=2')
  assert run(folder, *flags, *small, texts='pairs.jsonl') == 0
  whole, fewer = json.loads(file.read_text())['rows']
  assert fewer['ms_per_step'] > 0
  assert fewer['ms_per_step'] != whole['ms_per_step']
  model = gqa_t5x.load(folder)
  texts = (folder / 'texts.txt').read_text().split('\n')[1::2]
  expected = model.loss(texts, [t[:9] for t in texts])
  np.testing.assert_allclose(whole['loss'], expected, rtol=1e-4)


def test_goes_on_where_it_was_stopped(folder, tmp_path, monkeypatch):
  file = tmp_path / 'rows.json'
  flags = ('--num_kv_heads=1,2', f'--json={file}', '--notime')
  whole = comparison.quality
  converted = []

  def stopped(model, chosen, *args):
    for i, row in enumerate(whole(model, chosen, *args)):
      if i == 2:
        raise KeyboardInterrupt
      converted.append(chosen[i])
      yield row

  monkeypatch.setattr(comparison, 'quality', stopped)
  assert run(folder, *flags) == 130
  assert len(json.loads(file.read_text())['rows']) == 2

  def watched(model, chosen, *args):
    converted.extend(chosen)
    return whole(model, chosen, *args)

  monkeypatch.setattr(comparison, 'quality', watched)
  assert run(folder, *flags) == 0
  assert converted == ROWS
  monkeypatch.undo()
  assert run(folder, *flags, '--max_texts=4') == 1


@pytest.mark.parametrize(
  ('increases', 'said'),
  [
    ({4: 0.01, 1: 0.04}, 'Take K = 1 by svd: its loss is +0.040 nats before'),
    ({4: 0.01, 1: 0.06}, 'Take K = 4 by svd: its loss is +0.010 nats before'),
    (
      {4: 0.2, 1: 0.9},
      'None is within 0.05 nats: the least, K = 4 by svd, loses 0.200',
    ),
    ({}, 'Nothing was compared'),
  ],
)
def test_recommendation(increases, said):
  rows = [made_row(8, '-', 0.0)]
  rows += [made_row(K, 'svd', x) for K, x in increases.items()]
  assert comparison.recommendation(rows, 0.05).startswith(said)


def test_int8(folder, tmp_path, capsys):
  """Losses are those of the API; what costs nothing has all tokens equal."""
  file = tmp_path / 'int8.json'
  assert run(folder, '--quantize', f'--json={file}', '--output_length=6') == 0
  rows = json.loads(file.read_text())
  names = ['-', 'weights', 'cache', 'weights_and_cache']
  assert [row['quantize'] for row in rows] == names
  texts = (folder / 'texts.txt').read_text().split('\n')
  model = gqa_t5x.load(folder)
  judged = model.examples(texts[1::2])
  for row in rows:
    one = model if row['quantize'] == '-' else model.quantize(row['quantize'])
    np.testing.assert_allclose(row['loss'], one.evaluate(judged)['loss'], rtol=1e-5)
    assert row['loss_increase'] == row['loss'] - rows[0]['loss']
    assert 0 <= row['equal_tokens'] <= 1
  assert rows[0]['equal_tokens'] == 1
  assert len({row['loss'] for row in rows}) == 4
  assert 'equal tokens' in capsys.readouterr().out


def test_equal_tokens():
  """By place; what one of them lacks is not equal."""
  assert comparison._equal_tokens([[5, 6, 7], [8]], [[5, 9, 7, 1], [8]]) == 3 / 5


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--quantize', '--num_kv_heads=2'], '--num_kv_heads is not for --quantize'),
    (['--num_kv_heads=3'], 'num_kv_heads=3; choose from 1, 2, 4, 8, all'),
    (['--methods=median'], "unknown method 'median'"),
    (['--latent', '--methods=mean'], '--latent: none of these methods can make it'),
    (['--keys=a,b,c'], '--keys=a,b,c: give one, or two of a pair'),
    (['--texts=nowhere.txt'], 'nowhere.txt is not there'),
    (['--texts=/'], '/ is a folder'),
    (['--max_texts=1'], 'max_texts'),
    (['--tokenizer=nowhere'], 'nowhere has no tokenizer'),
    (['--input=nowhere'], 'there is no checkpoint at nowhere'),
    (['--dtype=int8'], 'dtype'),
  ],
)
def test_bad_input(flags, message, folder, capsys):
  assert run(folder, *flags) == 1
  error = capsys.readouterr().err
  assert message in error
  assert re.fullmatch(r'error: [^\n]*\n', error.split('\r')[-1])


def test_the_latent_form_beside_gqa_of_its_cache(folder, tmp_path, capsys):
  file = tmp_path / 'rows.json'
  small = ('--input_length=16', '--output_length=8', '--batch_size=2')
  assert run(folder, '--latent', '--num_kv_heads=1,2', f'--json={file}', *small) == 0
  rows = {tuple(map(r.get, KEYS)): r for r in json.loads(file.read_text())['rows']}
  assert list(rows) == [*ROWS, (1, 'svd', 8)]  # Heads are of 4 numbers.
  latent, grouped = rows[1, 'svd', 8], rows[2, 'svd', None]
  for key in ('cache_bytes_per_input_token', 'cache_bytes_per_output_token'):
    assert latent[key] == grouped[key]
  assert latent['ms_per_step'] != grouped['ms_per_step']
  assert latent['ms_per_step'] != rows[1, 'svd', None]['ms_per_step']
  texts = (folder / 'texts.txt').read_text().split('\n')
  model = gqa_t5x.load(folder)
  one = model.convert(1, 'svd', texts[::2], kv_head_dim=8)
  expected = one.evaluate(model.examples(texts[1::2]))['loss']
  np.testing.assert_allclose(latent['loss'], expected, rtol=1e-4)
  assert re.search(r'^ *1 +8 +svd ', capsys.readouterr().out, re.MULTILINE)


def test_the_latent_form_is_recommended_by_its_cache():
  rows = [made_row(8, '-', 0.0), made_row(2, 'svd', 0.04), made_row(1, 'svd', 0.01, 8)]
  said = comparison.recommendation(rows, 0.05)
  assert said.startswith('Take K = 1, R = 8 by svd: its loss is +0.010 nats')
  assert said.endswith('its cache 1/4.')


def made_row(K, method, increase, R=None):
  nbytes = 16 * K * (R or 4)
  return dict(zip(KEYS, (K, method, R), strict=True)) | {
    'loss_increase': increase,
    'cache_bytes_per_input_token': nbytes,
  }


def test_fewer_than_two_texts(folder, tmp_path, capsys):
  (tmp_path / 'one.txt').write_text('one text')
  assert run(folder, f'--texts={tmp_path / "one.txt"}') == 1
  assert 'one.txt has 1 texts; two are the least' in capsys.readouterr().err


def test_a_file_of_something_else(folder, tmp_path, capsys):
  (tmp_path / 'rows.json').write_text('[1]')
  assert run(folder, f'--json={tmp_path / "rows.json"}') == 1
  assert 'is no file of this command' in capsys.readouterr().err
