"""Outputs refitted to the original's: against least squares and NumPy loops."""

import json
import re

import numpy as np
import pytest

from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
from gqa_t5x.conversion import input_sums, output_sums
from gqa_t5x.conversion.module_arrays import samples
from gqa_t5x.conversion.output_refit import refit, write_sums
from gqa_t5x.conversion.plan import convert_params
from gqa_t5x.errors import BadInput
from gqa_t5x.model import network
from helpers import exports, model_oracle, trees
from helpers.model_oracle import H, N
from helpers.module_oracle import unfolded
from helpers.trees import flat, run_convert

MODULES = [
  f'decoder/layers_{layer}/{name}'
  for layer in (0, 1)
  for name in ('self_attention', 'encoder_decoder_attention')
]
ENCODER = 'encoder/layers_0/attention'
# How the heads become others: of the decoder, and of the encoder.
FORMS = {
  'MQA': {'num_kv_heads': 1},
  'GQA': {'num_kv_heads': 2, 'encoder_num_kv_heads': 2},
  'cross': {'cross_attention_num_kv_heads': 1},
  'latent': {'num_kv_heads': 1, 'kv_head_dim': 5},
  'latents': {'num_kv_heads': 2, 'kv_head_dim': 7},
}
ORIGINAL = model_oracle.config()


def converted(form):
  """The configuration and parameters of the small model, converted."""
  fields = FORMS[form]
  params = convert_params(model_oracle.params(ORIGINAL), method='svd', **fields)
  return ORIGINAL.replace(**fields), params


def num_kv_heads(cfg, module):
  kinds = {'self_attention': cfg.self_kv, 'attention': cfg.encoder_kv}
  return kinds.get(module.rpartition('/')[2], cfg.cross_kv)


# --- The regression ---------------------------------------------------------------


@pytest.mark.parametrize('ridge', [1e-9, 0.5])
def test_it_is_the_least_squares_solution(ridge):
  rng, X, tokens = np.random.default_rng(0), 9, 40
  said, wanted = rng.normal(size=(tokens, X)) * 3, rng.normal(size=(tokens, 4))
  before = rng.normal(size=(X, 4))
  heads, residual = said.T @ said, said.T @ (wanted - said @ before)
  got = refit(before, heads / tokens, residual / tokens, ridge)
  # The ridge is rows that ask for what there was.
  held = np.sqrt(ridge * np.mean(np.sum(said**2, axis=0))) * np.eye(X)
  rows, targets = np.concatenate([said, held]), np.concatenate([wanted, held @ before])
  np.testing.assert_allclose(got, np.linalg.lstsq(rows, targets)[0], atol=1e-6)


def test_heads_that_say_nothing_stay():
  before = np.arange(6.0).reshape(3, 2)
  got = refit(before, np.zeros((3, 3)), np.zeros((3, 2)))
  np.testing.assert_array_equal(got, before)


# --- The sums ---------------------------------------------------------------------


@model_oracle.jit
def norm_outputs(params, batch):
  """What each layer norm of the original returns."""
  _, state = network.Transformer(ORIGINAL).apply(
    {'params': params},
    **batch,
    enable_dropout=False,
    capture_intermediates=lambda module, _: (module.name or '').endswith('norm'),
  )
  return state['intermediates']


def read_by(module):
  """Each example's (queries' inputs, keys' inputs, position bias) of a module."""
  params, batch = model_oracle.params(ORIGINAL), model_oracle.batch()
  seen = norm_outputs(params, batch)
  stack, layer, name = module.split('/')
  norm = {
    'self_attention': 'pre_self_attention_layer_norm',
    'encoder_decoder_attention': 'pre_cross_attention_layer_norm',
    'attention': 'pre_attention_layer_norm',
  }[name]
  queries = np.asarray(seen[stack][layer][norm]['__call__'][0], np.float64)
  encoded = np.asarray(seen['encoder']['encoder_norm']['__call__'][0], np.float64)
  for i, (inputs, targets) in enumerate(model_oracle.examples()):
    length = len(inputs if stack == 'encoder' else targets)
    x, bias = queries[i, :length], None
    if name != 'encoder_decoder_attention':
      table = params[stack]['relpos_bias']['rel_embedding']
      both = stack == 'encoder'
      bias = model_oracle.position_bias(table, length, length, both)
      bias = bias if both else bias + np.where(np.tri(length), 0, -np.inf)
    yield x, (encoded[i, : len(inputs)] if bias is None else x), bias


def kernels_of(params, module):
  names = ('query', 'key', 'value', 'out', 'key_up', 'value_up')
  leaves = dict(flat(params))
  paths = {name: f'{module}/{name}/kernel' for name in names}
  found = {n: leaves[path] for n, path in paths.items() if path in leaves}
  return {n: np.asarray(kernel, np.float64) for n, kernel in found.items()}


def said_by(kernels, x, y, bias):
  """What the heads of a module of MHA or GQA say, [T, N*H], example alone."""
  q, k, v = (
    (z @ kernels[name]).reshape(len(z), -1, H)
    for z, name in ((x, 'query'), (y, 'key'), (y, 'value'))
  )
  return model_oracle.attend(q, k, v, bias).reshape(len(x), -1)


def oracle(params, module, K):
  """Means of c'^T c' and c'^T (y - c' O'), token by token."""
  old, new = (kernels_of(p, module) for p in (model_oracle.params(ORIGINAL), params))
  if 'key_up' in new:
    new = unfolded(new, K, num_heads=N)
  heads, residual, tokens = 0, 0, 0
  for x, y, bias in read_by(module):
    said = said_by(new, x, y, bias)
    missing = said_by(old, x, y, bias) @ old['out'] - said @ new['out']
    for t in range(len(x)):
      heads = heads + np.outer(said[t], said[t])
      residual = residual + np.outer(said[t], missing[t])
    tokens += len(x)
  return heads / tokens, residual / tokens


_sums = model_oracle.jit(output_sums.sum_outputs, static_argnums=(0, 2))


def collected(form, *batches, **original):
  cfg, params = converted(form)
  module, totals = network.Transformer(ORIGINAL.replace(**original)), {}
  for batch in batches:
    sums = _sums(module, model_oracle.params(ORIGINAL), cfg, params, batch)
    input_sums.add_sums(totals, sums)
  return cfg, params, input_sums.means(totals)


def assert_sums(got, params, cfg, modules):
  assert sorted(got) == sorted(modules)
  for module in modules:
    K = num_kv_heads(cfg, module)
    expected = oracle(params, module, K)
    for name, wanted in zip(('heads', 'residual'), expected, strict=True):
      assert got[module][name].dtype == np.float32
      np.testing.assert_allclose(
        got[module][name],
        wanted,
        rtol=0,
        atol=2e-5 * np.abs(wanted).max(),
        err_msg=name,
      )


@pytest.mark.parametrize('form', FORMS)
def test_sums_are_those_of_the_loops(form):
  """Of padded examples; the modules with other heads alone are looked at."""
  cfg, params, got = collected(form, model_oracle.batch())
  modules = [m for m in MODULES if form != 'cross' or 'encoder_decoder' in m]
  modules += [ENCODER] if form == 'GQA' else []
  assert_sums(got, params, cfg, modules)


def test_sums_of_packed_rows_and_of_recomputed_layers():
  """Two batches, one of which has no second row."""
  first, second = model_oracle.packed_batch(), model_oracle.packed_batch()
  for name, rows in (('first', first), ('second', second)):
    for array in rows.values():
      array[int(name == 'first')] = 0
  cfg, params, got = collected('latent', first, second, remat_policy='full')
  assert_sums(got, params, cfg, MODULES)


def test_nothing_to_refit():
  params = model_oracle.params(ORIGINAL)
  module = network.Transformer(ORIGINAL)
  with pytest.raises(BadInput, match='has the key/value heads of the original'):
    output_sums.sum_outputs(module, params, ORIGINAL, params, model_oracle.batch())


# --- The command ------------------------------------------------------------------


def write_file(path, form, few=False):
  """The file that calibrate would write of the model's 22 inputs and 17 targets."""
  _, params, means = collected(form, model_oracle.batch())
  leaves = dict(flat(params))
  kernels = samples({p: LazyTensor.of(np.asarray(x)) for p, x in leaves.items()}, means)
  tokens = {'encoder': 500, 'decoder': N * H - 1 if few else N * H}
  info = {'checkpoint': 'here', 'step': 5, 'num_tokens': tokens, 'kernels': kernels}
  write_sums(path, means, info)
  return means


@pytest.fixture(scope='module')
def mha(tmp_path_factory):
  return exports.checkpoint(tmp_path_factory.mktemp('original') / 'mha', ORIGINAL)


@pytest.fixture(scope='module')
def made(mha, tmp_path_factory):
  """Form -> its converted checkpoint, and file of sums."""
  found = {}
  for form in ('GQA', 'latent'):
    folder = tmp_path_factory.mktemp(form)
    flags = [f'--{name}={value}' for name, value in FORMS[form].items()]
    flags += [f'--input={mha}', f'--output={folder}/new', '--method=svd']
    assert run_convert(*flags) == 0
    write_file(folder / 'sums.npz', form)
    found[form] = folder / 'new', folder / 'sums.npz'
  return found


@pytest.mark.parametrize('form', ['GQA', 'latent'])
def test_output_kernels_alone_change(form, made, tmp_path, capsys):
  """They are where the regression leaves them."""
  source, sums = made[form]
  flags = (f'--input={source}', f'--refit_outputs={sums}', f'--output={tmp_path}/out')
  assert run_convert(*flags) == 0
  out = capsys.readouterr().out
  assert 'Converted by refit_outputs' in out
  assert 'only the layout changed' not in out
  before, got = (
    trees.read(folder / f'checkpoint_{exports.STEP}')
    for folder in (source, tmp_path / 'out')
  )
  assert got.keys() == before.keys()
  cfg, params = converted(form)
  modules = MODULES + [ENCODER] * (form == 'GQA')
  for module in modules:
    heads, residual = oracle(params, module, num_kv_heads(cfg, module))
    regular = heads + 1e-3 * np.trace(heads) / len(heads) * np.eye(N * H)
    old = kernels_of(params, module)['out']
    expected = old + np.linalg.solve(regular, residual)
    path = f'target/{module}/out/kernel'
    assert np.abs(expected - old).max() > 0.01
    np.testing.assert_allclose(got.pop(path), expected, atol=1e-3)
  for path, value in got.items():
    np.testing.assert_array_equal(value, before[path])
  assert run_convert(f'--verify={tmp_path}/out') == 0
  manifest = tmp_path / 'out' / f'checkpoint_{exports.STEP}' / 'gqa_t5x_manifest.json'
  method = json.loads(manifest.read_text())['method']
  assert method == {'name': 'refit_outputs', 'sums': str(sums)}


def test_each_module_comes_closer_to_the_original(made):
  """In squared error, on the examples of the sums."""
  _, sums = made['latent']
  cfg, params = converted('latent')
  refitted = convert_params(params, refit_outputs=str(sums))
  for module in MODULES:
    old = kernels_of(model_oracle.params(ORIGINAL), module)
    errors = []
    for p in (params, refitted):
      new = unfolded(kernels_of(p, module), cfg.self_kv, num_heads=N)
      errors.append(
        sum(
          np.sum(
            (said_by(old, *read) @ old['out'] - said_by(new, *read) @ new['out']) ** 2
          )
          for read in read_by(module)
        )
      )
    assert errors[1] < 0.8 * errors[0]


def test_moments_of_refitted_kernels_are_reset(tmp_path):
  tree = trees.tiny_state(2)
  source = trees.write_msgpack(tmp_path / 'gqa' / 'checkpoint_1000', tree)
  module, X = 'decoder/layers_1/self_attention', trees.N * trees.H
  sums = {'heads': np.eye(X), 'residual': np.ones((X, trees.D))}
  info = {'num_tokens': {'encoder': X, 'decoder': X}}
  write_sums(tmp_path / 'sums.npz', {module: sums}, info)
  flags = (f'--input={source}', f'--refit_outputs={tmp_path}/sums.npz')
  assert run_convert(*flags, f'--output={tmp_path}/out') == 0
  got, before = trees.read(tmp_path / 'out' / 'checkpoint_1000'), dict(flat(tree))
  changed = {p for p in got if not np.array_equal(got[p], before[p])}
  out = f'{module}/out/kernel'
  assert changed == {f'target/{out}', f'state/param_states/{out}/v'}
  np.testing.assert_allclose(
    got[f'target/{out}'], before[f'target/{out}'] + 1 / 1.001, rtol=1e-5
  )
  assert not got[f'state/param_states/{out}/v'].any()


# --- Bad input --------------------------------------------------------------------


def refused(capsys, tmp_path, *flags):
  assert run_convert(*flags, f'--output={tmp_path}/out') == 1
  err = capsys.readouterr().err
  assert err.count('\n') == 1
  assert not (tmp_path / 'out').exists()
  return err


def test_sums_of_another_checkpoint(made, mha, tmp_path, capsys):
  """Of other sizes, of other heads, of other weights, and of one that is refitted."""
  source, sums = made['latent']
  flag = f'--refit_outputs={sums}'
  tiny = trees.write_msgpack(tmp_path / 'a' / 'checkpoint_1000', trees.tiny_state(1))
  err = refused(capsys, tmp_path, f'--input={tiny}', flag)
  assert 'are of shape (24, 24), expected (8, 8): they are of another checkpoint' in err
  err = refused(capsys, tmp_path, f'--input={mha}', flag)
  assert re.search('is of another checkpoint, step 5 of here: .* has other values', err)
  again = (f'--input={source}', flag, f'--output={tmp_path}/refitted')
  assert run_convert(*again) == 0
  capsys.readouterr()
  err = refused(capsys, tmp_path, f'--input={tmp_path}/refitted', flag)
  assert re.search('is of another checkpoint, .*/out/kernel has other values', err)


def test_other_flags_and_other_files(made, mha, tmp_path, capsys):
  source, sums = made['GQA']
  flags = (f'--input={source}', f'--refit_outputs={sums}')
  err = refused(capsys, tmp_path, *flags, '--num_kv_heads=1', '--method=mean')
  assert 'alone; leave out --num_kv_heads, --method' in err
  err = refused(capsys, tmp_path, flags[0], f'--refit_outputs={tmp_path}/none')
  assert 'there is no file of output sums at' in err
  err = refused(
    capsys,
    tmp_path,
    f'--input={mha}',
    '--num_kv_heads=1',
    '--method=svd',
    f'--statistics={sums}',
  )
  assert 'no file of statistics: cannot read its index (it has output sums)' in err


def test_too_few_tokens(tmp_path):
  with pytest.raises(BadInput) as error:
    write_file(tmp_path / 'few.npz', 'MQA', few=True)
  assert str(error.value) == (
    'the texts have 23 tokens for the decoder, and to refit the outputs of'
    ' decoder/layers_0/encoder_decoder_attention takes 24 at least, as many as its'
    ' heads have numbers; give more texts'
  )
  assert list(tmp_path.iterdir()) == []
