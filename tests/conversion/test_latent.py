"""The latent form: one module against NumPy, whole models, moments, and the command."""

import json

import numpy as np
import pytest

from gqa_t5x.checkpoints import folders
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
from gqa_t5x.checkpoints.tree import Architecture
from gqa_t5x.conversion import adafactor_moments
from gqa_t5x.conversion.input_statistics import InputStatistics, write_statistics
from gqa_t5x.conversion.methods import convert_module
from gqa_t5x.conversion.plan import Recipe, convert_params, plan_conversion
from gqa_t5x.errors import BadInput
from helpers import exports, model_oracle, module_oracle, trees
from helpers.module_oracle import D, H, N, P, module

# Source heads, new ones, and their size.
CASES = [(8, 1, 1), (8, 1, 13), (8, 2, 7), (4, 1, 9), (4, 2, 3), (8, 8, 3), (1, 1, 2)]


def shared(S, K, R, dtype=np.float64, inputs=None):
  """Kernels of a random module, before and after, by its own statistics."""
  kernels = module_oracle.random_kernels(S, dtype=dtype)
  inputs = inputs or module_oracle.sample()[2]
  made = convert_module(kernels, module(S, K, kv_head_dim=R), 'svd', inputs)
  return kernels, made


@pytest.mark.parametrize(('S', 'K', 'R'), CASES)
def test_what_is_lost_is_the_rest_of_the_spectrum(S, K, R):
  kernels, got = shared(S, K, R)
  assert got['key'].shape == got['value'].shape == (D, K * R)
  assert got['key_up'].shape == got['value_up'].shape == (R, N * H)
  for name in ('query', 'out'):
    assert got[name] is kernels[name]
  x_TD, y_PD, inputs = module_oracle.sample()
  after = module_oracle.unfolded(got, K)
  errors = module_oracle.measured(kernels, after, K, x_TD, y_PD)
  rows = {'key': y_PD - y_PD.mean(axis=0), 'value': y_PD}
  for name in rows:
    for k in range(K):
      heads = range(k * S // K, (k + 1) * S // K)
      problem = module_oracle.group_problem(kernels, heads, inputs, name)
      values, _ = module_oracle.best_approximation(rows[name] / np.sqrt(P), *problem)
      lost = values[R:].sum()
      assert lost > 0
      np.testing.assert_allclose(errors[name][k], lost, rtol=1e-8)


@pytest.mark.parametrize(('S', 'K'), [(8, 1), (8, 2), (4, 1), (2, 2)])
def test_as_many_numbers_as_the_heads_have_lose_nothing(S, K):
  kernels, got = shared(S, K, S // K * H, np.float32)
  x_TD, y_PD, _ = module_oracle.sample(1)  # Other inputs than it was converted by.
  bias_NTP = module_oracle.RNG(3).normal(size=(N, len(x_TD), P))
  expected = module_oracle.attention(kernels, x_TD, y_PD, bias_NTP)
  after = got if S == K else module_oracle.unfolded(got, K)
  got = module_oracle.attention(after, x_TD, y_PD, bias_NTP)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_kernels_are_of_a_scale_to_train_at():
  kernels, got = shared(8, 1, 13)
  for name in ('key', 'value'):
    rms, old = (np.sqrt(np.mean(x[name] ** 2)) for x in (got, kernels))
    np.testing.assert_allclose(rms, old, rtol=1e-9)
    assert np.sqrt(np.mean(got[f'{name}_up'] ** 2)) > 1e-3  # Adafactor's least.


# --- Whole models -----------------------------------------------------------------


def convert(folder, cfg, *flags):
  """Converts a random model by the command; returns its sizes and parameters."""
  source = exports.checkpoint(folder / 'mha', cfg)
  out = folder / 'out'
  given = (f'--input={source}', f'--output={out}', '--method=svd', *flags)
  assert trees.run_convert(*given) == 0
  params, sizes = folders.read_params(out / f'checkpoint_{exports.STEP}')
  return sizes, params


WHOLE = model_oracle.N * model_oracle.H


@pytest.mark.parametrize(
  ('K', 'new', 'R'),
  [(model_oracle.N, 1, WHOLE), (model_oracle.N, 2, WHOLE // 2), (2, 1, WHOLE // 2)],
)
def test_of_all_numbers_it_is_the_model_that_it_was(K, new, R, tmp_path):
  cfg = model_oracle.config(K)
  flags = (f'--num_kv_heads={new}', f'--kv_head_dim={R}')
  sizes, params = convert(tmp_path, cfg, *flags)
  assert sizes.num_kv_heads == {
    'encoder': model_oracle.N,
    'self_attention': new,
    'cross_attention': new,
  }
  assert sizes.kv_head_dim == R
  batch = model_oracle.batch()
  latent = cfg.replace(num_kv_heads=new, kv_head_dim=R)
  got, expected = (
    np.asarray(model_oracle.forward(c)(p, batch))[batch['decoder_target_tokens'] > 0]
    for c, p in ((latent, params), (cfg, model_oracle.params(cfg)))
  )
  scale = np.abs(expected).max()
  np.testing.assert_allclose(got / scale, expected / scale, atol=1e-5)
  assert trees.run_convert(f'--verify={tmp_path}/out') == 0


@pytest.mark.parametrize('flags', [[], ['--encoder_num_kv_heads=1']])
def test_of_the_head_size_it_is_gqa(flags, tmp_path):
  flags, cfg = ['--num_kv_heads=1', *flags], model_oracle.config()
  sizes, got = convert(tmp_path / 'a', cfg, f'--kv_head_dim={model_oracle.H}', *flags)
  _, expected = convert(tmp_path / 'b', cfg, *flags)
  assert sizes.kv_head_dim is None
  got, expected = dict(trees.flat(got)), dict(trees.flat(expected))
  assert got.keys() == expected.keys()
  for path, value in expected.items():
    np.testing.assert_array_equal(got[path], value)


def test_the_encoder_has_no_latent_heads():
  before = trees.tiny_params()
  got = convert_params(
    before, num_kv_heads=1, encoder_num_kv_heads=2, kv_head_dim=3, method='svd'
  )
  got, shapes = dict(trees.flat(got)), trees.tiny_shapes(encoder_kv_heads=2)
  for path, shape in shapes.items():
    if 'decoder' in path and path.split('/')[-2] in ('key', 'value'):
      assert got.pop(path).shape == (trees.D, 3)
    else:
      assert got.pop(path).shape == shape
  assert sorted(got) == [
    f'decoder/layers_{layer}/{module}/{name}/kernel'
    for layer in (0, 1)
    for module in ('encoder_decoder_attention', 'self_attention')
    for name in ('key_up', 'value_up')
  ]
  assert {kernel.shape for kernel in got.values()} == {(3, trees.N * trees.H)}


# --- Moments ----------------------------------------------------------------------


def planned(sizes, new, R, moments):
  """Shapes of the moments of a decoder module after a conversion, read by nobody."""

  def lazy(shape):
    return LazyTensor(tuple(shape), np.dtype(np.float32), None)

  shapes = sizes.shapes()
  tensors = {f'target/{path}': lazy(shape) for path, shape in shapes.items()}
  for path, shape in shapes.items():
    for name, of in moments(shape).items():
      tensors[f'state/param_states/{path}/{name}'] = lazy(of)
  recipe = Recipe(num_kv_heads=new, kv_head_dim=R, method='svd')
  outputs = plan_conversion(tensors, recipe).outputs
  prefix = 'state/param_states/decoder/layers_0/self_attention/'
  found = {}
  for path, spec in outputs.items():
    if path.startswith(prefix) and spec.shape != (1,):
      kernel, _, name = path.removeprefix(prefix).partition('/kernel/')
      found.setdefault(kernel, {})[name] = spec.shape
  return found


def adafactor(shape):
  """What T5X's Adafactor keeps of a parameter; nothing here is square."""
  unused = {name: (1,) for name in adafactor_moments.NAMES}
  if len(shape) == 2 and min(shape) >= 128:
    return unused | {'v_row': (min(shape),), 'v_col': (max(shape),)}
  return unused | {'v': shape}


def not_factored(shape):
  return {'m': shape, 'v': shape, 'v_row': (1,), 'v_col': (1,)}


def architecture(D, S):
  heads = {'encoder': 6, 'self_attention': S, 'cross_attention': S}
  return Architecture(200, D, 300, 6, 64, 32, {'encoder': 1, 'decoder': 1}, heads)


@pytest.mark.parametrize(
  ('D', 'S', 'R'),
  [
    (512, 6, 256),  # factored, rows and columns change places
    (512, 6, 100),  # too narrow
    (512, 1, 60),
    (512, 2, 128),  # from GQA
    (96, 6, 256),  # the source has none that is factored, key_up is
  ],
)
def test_moments_are_those_that_adafactor_starts_with(D, S, R):
  got = planned(architecture(D, S), 1, R, adafactor)
  shapes = {'key': (D, R), 'key_up': (R, 6 * 64), 'value': (D, R)}
  shapes |= {'value_up': (R, 6 * 64), 'query': (D, 6 * 64), 'out': (6 * 64, D)}
  used = {
    name: {n: of for n, of in adafactor(shape).items() if of != (1,)}
    for name, shape in shapes.items()
  }
  assert got == used


def test_momentum_stays_and_so_does_what_is_not_factored():
  got = planned(architecture(512, 6), 2, 160, not_factored)
  assert got['key_up'] == {'m': (160, 384), 'v': (160, 384)}
  assert got['value'] == {'m': (512, 320), 'v': (512, 320)}


def test_moments_are_reset_and_others_stay(tmp_path, capsys):
  tree = trees.tiny_state()
  source = trees.write_msgpack(tmp_path / 'mha' / 'checkpoint_1000', tree)
  flags = ('--num_kv_heads=1', '--kv_head_dim=5', '--method=svd')
  got = trees.read(trees.convert(source, tmp_path / 'out', *flags, '--verbose'))
  out, before = capsys.readouterr().out, dict(trees.flat(tree))
  module = 'decoder/layers_1/self_attention'
  assert f'moments of {module}/key_up/kernel: none -> v (5, 8), reset to zero' in out
  assert f'moments of {module}/key/kernel: v (6, 8) -> v (6, 5), reset to zero' in out
  for name, shape in {'key': (6, 5), 'value_up': (5, 8)}.items():
    path = f'state/param_states/{module}/{name}/kernel'
    np.testing.assert_array_equal(got[f'{path}/v'], np.zeros(shape, np.float32))
    assert got[f'{path}/m'].shape == (1,)
  path = f'state/param_states/{module}/query/kernel/v'
  np.testing.assert_array_equal(got[path], before[path])


# --- What is said -----------------------------------------------------------------


@pytest.fixture
def mha(tmp_path):
  tree = trees.tiny_state(moments=False)
  return trees.write_msgpack(tmp_path / 'mha' / 'checkpoint_1000', tree)


def test_dry_run(mha, capsys):
  flags = ('--num_kv_heads=1', '--kv_head_dim=4', '--method=svd', '--dry_run')
  assert trees.run_convert(f'--input={mha}', *flags) == 0
  lines = capsys.readouterr().out.splitlines()
  path = 'decoder/layers_{0..1}/self_attention/'
  assert f'  {path}key/kernel  [6, 8] -> [6, 4]  svd' in lines
  assert f'  {path}key_up/kernel  new -> [4, 8]  svd' in lines
  # K and V, two layers, a head of 4, 2 bytes.
  assert '64 -> 32 bytes per output token' in lines[-2]


def test_the_manifest_has_the_size(mha, tmp_path):
  flags = ('--num_kv_heads=1', '--kv_head_dim=4', '--method=svd')
  made = trees.convert(mha, tmp_path / 'out', *flags)
  record = json.loads((made / 'gqa_t5x_manifest.json').read_text())
  assert record['architecture']['kv_head_dim'] == 4
  assert record['num_kv_heads']['self_attention'] == 1


SVD = ('--num_kv_heads=1', '--method=svd')
BAD = {
  'none': ((*SVD, '--kv_head_dim=0'), 'kv_head_dim=0 must be a whole number from 1 to'),
  'negative': ((*SVD, '--kv_head_dim=-2'), 'kv_head_dim=-2 must be a whole number'),
  'above N*H': (
    (*SVD, '--kv_head_dim=9'),
    'kv_head_dim=9 must be a whole number from 1 to 8: in self-attention a new head'
    ' stands for 4 of 2 numbers each',
  ),
  'above those that share': (
    ('--num_kv_heads=2', '--method=svd', '--kv_head_dim=5'),
    'kv_head_dim=5 must be a whole number from 1 to 4: in self-attention a new head'
    ' stands for 2 of 2 numbers each',
  ),
  'one kind alone': (
    ('--cross_attention_num_kv_heads=1', '--method=svd', '--kv_head_dim=5'),
    'from 1 to 2: in self-attention a new head stands for 1 of 2',
  ),
  'method': (
    ('--num_kv_heads=1', '--kv_head_dim=4'),
    'kv_head_dim=4 is not the head size, 2, and method=mean makes heads of that size'
    ' alone; choose method=svd, or leave kv_head_dim out',
  ),
  'grouping': (
    (*SVD, '--kv_head_dim=4', '--grouping=similarity'),
    'grouping=similarity is for heads of the head size, 2; leave it out, or leave'
    ' kv_head_dim=4 out',
  ),
  'text': ((*SVD, '--kv_head_dim=wide'), 'flag --kv_head_dim=wide: '),
  'no heads': (('--kv_head_dim=4', '--method=svd'), '--num_kv_heads is missing'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_gets_one_line(case, mha, tmp_path, capsys):
  flags, message = BAD[case]
  given = (f'--input={mha}', f'--output={tmp_path / "out"}', *flags)
  assert trees.run_convert(*given) == 1
  err = capsys.readouterr().err
  assert err.startswith('error: ')
  assert message in err
  assert err.count('\n') == 1
  assert not (tmp_path / 'out').exists()


def test_no_whole_number():
  with pytest.raises(BadInput, match=r'kv_head_dim=2\.5 must be a whole number'):
    convert_params(trees.tiny_params(), num_kv_heads=1, kv_head_dim=2.5, method='svd')


@pytest.mark.parametrize(
  'flags', [['--num_kv_heads=1'], ['--num_kv_heads=2', '--kv_head_dim=2']]
)
def test_it_is_not_converted_again(flags, mha, tmp_path, capsys):
  latent = ('--num_kv_heads=2', '--kv_head_dim=3', '--method=svd')
  made = trees.convert(mha, tmp_path / 'latent', *latent)
  flags = (f'--input={made}', f'--output={tmp_path}/out', '--method=svd', *flags)
  assert trees.run_convert(*flags) == 1
  assert (
    'the checkpoint is of the latent form: 2 and 2 key/value heads of 3 numbers in'
    ' self- and cross-attention, and those cannot become others; convert the one that'
    ' it was made from'
  ) in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()
  # To itself, it is only laid out anew; and its encoder can be converted.
  again = trees.read(trees.convert(made, tmp_path / 'again', *latent))
  for path, value in trees.read(made).items():
    np.testing.assert_array_equal(again[path], value)
  out = trees.convert(made, tmp_path / 'encoder', '--encoder_num_kv_heads=1')
  key = 'target/encoder/layers_0/attention/key/kernel'
  assert trees.read(out)[key].shape == (trees.D, trees.H)


def test_too_few_tokens_for_the_directions(mha, tmp_path, capsys):
  ones = np.ones((trees.D, trees.D))
  file = tmp_path / 'few.npz'
  info = {'num_tokens': {'encoder': 30, 'decoder': 4}}
  statistics = dict.fromkeys(
    (
      f'decoder/layers_{i}/{name}'
      for i in (0, 1)
      for name in ('self_attention', 'encoder_decoder_attention')
    ),
    InputStatistics(ones, ones, ones),
  )
  write_statistics(file, statistics, info)
  given = (f'--input={mha}', f'--statistics={file}', *SVD, '--dry_run')
  assert trees.run_convert(*given, '--kv_head_dim=4') == 0
  assert trees.run_convert(*given, '--kv_head_dim=5') == 1
  assert 'few.npz is of 4 tokens, fewer than kv_head_dim=5' in capsys.readouterr().err
