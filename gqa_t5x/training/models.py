"""The T5X adapter of the model: T5X's EncoderDecoderModel with fast decoding.

Written against T5X's API alone: T5X itself and the stand-in t5x_lite both do.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import seqio
from etils import epath
from flax import linen as nn
from t5x import models

from gqa_t5x.checkpoints import folders, tree
from gqa_t5x.decoding import generate, sampling
from gqa_t5x.errors import BadInput
from gqa_t5x.model import network, quantize, sizes

Array = jax.Array


class EncoderDecoderModel(models.EncoderDecoderModel):
  """T5X's encoder-decoder model; decodes with cross-attention K and V kept.

  Args are T5X's, but for:
    decode_fn: one of `gqa_t5x.decoding`, or of `t5x.decoding`; greedy by default.
  """

  def __init__(
    self,
    module: nn.Module,
    input_vocabulary: seqio.Vocabulary,
    output_vocabulary: seqio.Vocabulary,
    optimizer_def: Any,
    decode_fn: Callable[..., Any] = sampling.greedy,
    **kwargs,
  ):
    super().__init__(
      module, input_vocabulary, output_vocabulary, optimizer_def, decode_fn, **kwargs
    )

  def predict_batch_with_aux(
    self,
    params: Mapping[str, Any],
    batch: Mapping[str, Array],
    rng: Array | None = None,
    decoder_params: Mapping[str, Any] | None = None,
    return_all_decodes: bool | None = None,
    num_decodes: int | None = None,
    prompt_with_targets: bool = False,
  ) -> tuple[Array, Mapping[str, Array]]:
    """Decodes a batch; see T5X's method for arguments and result.

    Raises:
      ValueError: for parameters that do not fit the model, for two rngs, and for what
        the decode function refuses.
    """
    check_params(self, params)
    defaults = self._default_decoder_params
    if return_all_decodes is None:
      return_all_decodes = defaults.return_all_decodes
    decoder_params = dict(decoder_params or {})
    eos_id = decoder_params.setdefault('eos_id', self.output_vocabulary.eos_id or 1)
    if rng is not None:
      if decoder_params.get('decode_rng') is not None:
        raise BadInput('rng and decoder_params["decode_rng"] were given; keep one.')
      decoder_params['decode_rng'] = rng
    prompts = batch['decoder_input_tokens']
    if not isinstance(prompts.shape[0], int):  # Of t5x.export.
      raise BadInput(
        'A batch of any size cannot be decoded; set BATCH_SIZE to a number.'
      )
    # An end marker among the targets must not end the decode.
    forced = (prompts != eos_id) & prompt_with_targets
    decodes, scores = generate.generate(
      self.module,
      params,
      batch['encoder_input_tokens'],
      jnp.where(forced, prompts, 0),
      self.decode_fn,
      num_decodes=defaults.num_decodes if num_decodes is None else num_decodes,
      **decoder_params,
    )
    if not return_all_decodes:  # The best is last.
      decodes, scores = decodes[:, -1], scores[:, -1]
    return decodes, {'scores': scores}

  def score_batch(self, params, batch, return_intermediates: bool = False):
    """Checks parameters, and then scores, in int8 as configured; see T5X's method."""
    check_params(self, params)
    params = quantize.prepared(params, self.module.config.quantize)
    return super().score_batch(params, batch, return_intermediates)


def check_trainable(model: models.BaseTransformerModel) -> None:
  """Raises BadInput for a model in int8, which has no gradients."""
  quantization = getattr(getattr(model.module, 'config', None), 'quantize', None)
  if quantization is not None:
    raise BadInput(
      f'QUANTIZE={quantization!r} is for decoding: training is in float; leave'
      ' gin/decoding/int8.gin out.'
    )


def config_from_checkpoint(
  path: str,
  num_kv_heads: int | None = None,
  kv_head_dim: int | None = None,
  **overrides: Any,
) -> network.T5Config:
  """Returns the configuration of the model that a checkpoint of any format holds.

  Args:
    path: as of `folders.find_checkpoint`; nothing is read but names and shapes.
    num_kv_heads, kv_head_dim: what the checkpoint must have; None: what it has.
    **overrides: other fields of a `T5Config`.

  Raises:
    BadInput: there is no checkpoint, or it has other heads.
  """
  folder = folders.find_checkpoint(epath.Path(path))
  params = tree.parameters(folders.open_checkpoint(folder))
  architecture = tree.read_architecture({name: t.shape for name, t in params.items()})
  for kind in ('self_attention', 'cross_attention'):
    heads = architecture.num_kv_heads[kind]
    if num_kv_heads not in (None, heads):
      raise BadInput(
        f'NUM_KV_HEADS={num_kv_heads}, and {folder} has {heads} key/value heads in'
        f' {kind.replace("_", "-")}; leave it out, or convert the checkpoint: python -m'
        ' gqa_t5x.convert --help'
      )
    size = architecture.kv_size(kind)
    if kv_head_dim not in (None, size):
      raise BadInput(
        f'KV_HEAD_DIM={kv_head_dim}, and {folder} has key/value heads of size {size};'
        ' leave it out, or convert the checkpoint: python -m gqa_t5x.convert --help'
      )
  fields = sizes.from_checkpoint(architecture, folders.read_config(folder))
  return network.T5Config(**fields | overrides)


def check_params(
  model: models.BaseTransformerModel,
  params: Mapping[str, Any],
  source: str = 'the checkpoint',
) -> None:
  """Checks that parameters have the model's names and shapes.

  T5X checks no shapes when it restores: a checkpoint with other heads would fail later,
  in the middle of the network. Raises as `check_same_shapes`; `params` may be arrays,
  tracers or shapes.
  """
  tokens = {'encoder_input_tokens': (1, 1), 'decoder_input_tokens': (1, 1)}
  types = dict.fromkeys(tokens, jnp.int32)
  expected = jax.eval_shape(
    lambda rng: model.get_initial_variables(rng, tokens, types)['params'],
    jax.random.PRNGKey(0),
  )
  check_same_shapes(expected, params, f'parameters of {source}')


def check_same_shapes(expected: Any, got: Any, what: str) -> None:
  """Checks that trees of the model and of a checkpoint agree in names and shapes.

  Raises:
    BadInput: lists the differences, and says what to do.
  """
  expected, got = _flat_shapes(expected), _flat_shapes(got)
  differences = [
    f'  {name}: {got.get(name, "missing")} in the checkpoint,'
    f' {expected.get(name, "unknown")} in the model'
    for name in sorted(expected.keys() | got.keys())
    if expected.get(name) != got.get(name)
  ]
  if differences:
    shown = differences[:8]
    if len(differences) > len(shown):
      shown.append(f'  ... and {len(differences) - len(shown)} more')
    raise BadInput(
      f'The {what} do not fit the model:\n'
      + '\n'.join(shown)
      + '\nIf only key and value kernels differ, set NUM_KV_HEADS to the'
      f" checkpoint's heads{_kv_size_to_set(expected, got)}, or convert it: python -m"
      ' gqa_t5x.convert --help. If others do, this is a checkpoint of another model'
      ' size.'
    )


def _kv_size_to_set(*shapes: Mapping[str, tuple[int, ...]]) -> str:
  """Returns what else to set where model and checkpoint differ in the size of heads."""
  ours, theirs = (
    {shape[0] for name, shape in one.items() if name.endswith('/key_up/kernel')}
    for one in shapes
  )
  return '' if ours == theirs else f' and KV_HEAD_DIM to {min(theirs, default=None)}'


def _flat_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape)
    for path, leaf in leaves
  }
