"""Tiny T5.1.1 checkpoints.

The names and shapes below are written out by hand, after T5X's minimal T5.1.1.
"""

import pathlib

import numpy as np
from etils import epath

from gqa_t5x.checkpoints import folders, writer
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor, Unit
from gqa_t5x.checkpoints.tree import flatten as flat
from gqa_t5x.checkpoints.tree import unflatten as nest

V, D, F, N, H = 11, 6, 5, 4, 2
STEP = 1000
UNUSED = np.zeros((1,), np.float32)  # a moment that Adafactor does not keep


def tiny_shapes(
  num_kv_heads=N, *, encoder_kv_heads=N, decoder_layers=2, kv_head_dim=None
):
  """Path -> shape of a T5.1.1 of one encoder and two decoder layers."""
  shapes = {
    'token_embedder/embedding': (V, D),
    'encoder/relpos_bias/rel_embedding': (N, 32),
    'encoder/encoder_norm/scale': (D,),
    'decoder/relpos_bias/rel_embedding': (N, 32),
    'decoder/decoder_norm/scale': (D,),
    'decoder/logits_dense/kernel': (D, V),
  }
  size = kv_head_dim or H
  attentions = [('encoder/layers_0', 'attention', 'attention', encoder_kv_heads * H)]
  for i in range(decoder_layers):
    layer = f'decoder/layers_{i}'
    attentions += [
      (layer, 'self_attention', 'self_attention', num_kv_heads * size),
      (layer, 'encoder_decoder_attention', 'cross_attention', num_kv_heads * size),
    ]
    if kv_head_dim:
      shapes |= {
        f'{layer}/{kind}/{name}/kernel': (kv_head_dim, N * H)
        for kind in ('self_attention', 'encoder_decoder_attention')
        for name in ('key_up', 'value_up')
      }
  for layer, name, norm, columns in attentions:
    shapes |= {
      f'{layer}/pre_{norm}_layer_norm/scale': (D,),
      f'{layer}/{name}/query/kernel': (D, N * H),
      f'{layer}/{name}/key/kernel': (D, columns),
      f'{layer}/{name}/value/kernel': (D, columns),
      f'{layer}/{name}/out/kernel': (N * H, D),
      f'{layer}/pre_mlp_layer_norm/scale': (D,),
      f'{layer}/mlp/wi_0/kernel': (D, F),
      f'{layer}/mlp/wi_1/kernel': (D, F),
      f'{layer}/mlp/wo/kernel': (F, D),
    }
  return shapes


def read(folder):
  """Path -> array of every tensor in a checkpoint."""
  tensors = folders.open_checkpoint(epath.Path(folder))
  return {path: tensor.read() for path, tensor in tensors.items()}


def assert_same(got, tree):
  """Compares path -> array with a nested tree, dtypes included."""
  expected = dict(flat(tree))
  assert set(got) == set(expected)
  for path, value in expected.items():
    np.testing.assert_array_equal(got[path], value)
    assert got[path].dtype == value.dtype, path


def run_convert(*flags):
  """Runs `python -m gqa_t5x.convert` in this process; returns its exit code."""
  from gqa_t5x import convert

  return convert.main(['convert', *map(str, flags)])


def convert(source, output, *flags):
  """Converts a checkpoint of step 1000, to two heads by default; returns its folder."""
  given = (f'--input={source}', f'--output={output}', '--num_kv_heads=2', *flags)
  assert run_convert(*given) == 0
  name = f'checkpoint_{STEP}'
  return output if output.name == name else output / name


def tiny_params(num_kv_heads=N, seed=0, **kwargs):
  """Random float32 parameters, nested."""
  rng = np.random.default_rng(seed)
  shapes = tiny_shapes(num_kv_heads, **kwargs)
  return nest({p: rng.normal(size=s).astype(np.float32) for p, s in shapes.items()})


def tiny_state(num_kv_heads=N, *, moments=True, **kwargs):
  """A train state as T5X saves it: parameters, step and Adafactor's moments."""
  params = tiny_params(num_kv_heads, **kwargs)
  rng = np.random.default_rng(1)
  state = {'step': np.asarray(STEP, np.int32)}
  if moments:
    unused = dict.fromkeys(('m', 'v_row', 'v_col'), UNUSED)
    state['param_states'] = nest(
      {
        path: {**unused, 'v': rng.random(p.shape, np.float32)}
        for path, p in flat(params)
      }
    )
  return {'target': params, 'state': state}


def write_msgpack(folder: pathlib.Path, tree):
  """T5X's legacy layout with everything in the msgpack."""
  from flax import serialization

  folder.mkdir(parents=True)
  data = serialization.msgpack_serialize({'version': 3, 'optimizer': tree})
  (folder / 'checkpoint').write_bytes(data)
  return folder


def write_orbax(folder: pathlib.Path, tree):
  """T5X's Orbax layout, written by Orbax as T5X's checkpoint manager does."""
  import orbax.checkpoint as ocp

  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(folder.absolute() / 'state', args=ocp.args.PyTreeSave(tree))
  return folder


def write_t5x(folder: pathlib.Path, tree, **kwargs):
  """T5X's legacy layout by this project's writer, one unit a tensor."""
  tensors = {path: LazyTensor.of(array) for path, array in flat(tree)}
  units = [Unit({p: t}, lambda p=p, t=t: {p: t.read()}) for p, t in tensors.items()]
  sizes = []
  writer.write_checkpoint(epath.Path(folder), units, sizes.append, **kwargs)
  assert sum(sizes) == sum(array.nbytes for _, array in flat(tree))
  return folder
