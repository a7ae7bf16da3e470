"""The T5X adapter of the model: T5X's EncoderDecoderModel with fast decoding.

Written against T5X's API alone: T5X itself and the stand-in t5x_lite both do.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import seqio
from flax import linen as nn
from t5x import models

from gqa_t5x import decoding

Array = jax.Array


class EncoderDecoderModel(models.EncoderDecoderModel):
  """T5X's encoder-decoder model; decodes with cross-attention K and V kept.

  Args are T5X's, but for:
    decode_fn: None for `gqa_t5x.decoding` (greedy); a function of
      `t5x.decoding` to decode T5X's way.
  """

  def __init__(
    self,
    module: nn.Module,
    input_vocabulary: seqio.Vocabulary,
    output_vocabulary: seqio.Vocabulary,
    optimizer_def: Any,
    decode_fn: Callable[..., Any] | None = None,
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
    decoder_params: dict[str, Any] | None = None,
    return_all_decodes: bool | None = None,
    num_decodes: int | None = None,
    prompt_with_targets: bool = False,
  ) -> tuple[Array, Mapping[str, Array]]:
    """Decodes a batch; see T5X's method for arguments and result.

    Raises:
      ValueError: for parameters that do not fit the model, and for more than one
        decode or a prompt without a `decode_fn` of T5X.
    """
    check_params(self, params)
    if self.decode_fn is not None:
      return super().predict_batch_with_aux(
        params,
        batch,
        rng,
        decoder_params,
        return_all_decodes,
        num_decodes,
        prompt_with_targets,
      )
    defaults = self._default_decoder_params
    num_decodes = num_decodes or defaults.num_decodes
    if num_decodes != 1 or prompt_with_targets or decoder_params:
      raise ValueError(
        f'num_decodes={num_decodes}, prompt_with_targets={prompt_with_targets} and'
        f' decoder_params={decoder_params} need a decode function of T5X; bind'
        ' models.EncoderDecoderModel.decode_fn to @decoding.beam_search or'
        ' @decoding.temperature_sample of t5x.decoding.'
      )
    tokens_BT, scores_B = decoding.greedy(
      self.module,
      params,
      batch['encoder_input_tokens'],
      max_length=batch['decoder_input_tokens'].shape[1],
      eos_id=self.output_vocabulary.eos_id or 1,
    )
    if return_all_decodes or (
      return_all_decodes is None and defaults.return_all_decodes
    ):
      return tokens_BT[:, None], {'scores': scores_B[:, None]}
    return tokens_BT, {'scores': scores_B}

  def score_batch(self, params, batch, return_intermediates: bool = False):
    """Returns the log-likelihood of the targets; see T5X's method.

    Raises:
      ValueError: for parameters that do not fit the model.
    """
    check_params(self, params)
    return super().score_batch(params, batch, return_intermediates)


def check_params(
  model: models.BaseTransformerModel,
  params: Mapping[str, Any],
  source: str = 'the checkpoint',
) -> None:
  """Checks that parameters have the model's names and shapes.

  T5X's restoring checks no shapes: a checkpoint with other heads surfaces later, in
  the middle of the network.

  Args:
    model: the model.
    params: parameters (arrays, tracers or shapes).
    source: where they are from, for the message.

  Raises:
    ValueError: listing every difference, and what to do.
  """
  check_same_shapes(_expected_params(model), params, f'parameters of {source}')


def check_same_shapes(expected: Any, got: Any, what: str) -> None:
  """Checks that two trees agree in names and shapes.

  Args:
    expected: the model's tree of arrays or shapes.
    got: the checkpoint's.
    what: what the trees hold, for the message.

  Raises:
    ValueError: listing every difference, and what to do.
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
    raise ValueError(
      f'The {what} do not fit the model:\n'
      + '\n'.join(shown)
      + '\nIf only key and value kernels differ, set NUM_KV_HEADS to the'
      " checkpoint's heads, or convert it: python -m gqa_t5x.convert --help. If"
      ' others do, this is a checkpoint of another model size.'
    )


def _expected_params(model: models.BaseTransformerModel) -> Any:
  """Returns the shapes of the model's parameters."""
  tokens = {'encoder_input_tokens': (1, 1), 'decoder_input_tokens': (1, 1)}
  types = dict.fromkeys(tokens, jnp.int32)
  return jax.eval_shape(
    lambda rng: model.get_initial_variables(rng, tokens, types)['params'],
    jax.random.PRNGKey(0),
  )


def _flat_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape)
    for path, leaf in leaves
  }
