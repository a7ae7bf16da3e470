"""Cross entropy with z-loss, and the ways T5 divides a summed loss."""

import enum
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax


def cross_entropy_with_logits(logits, targets, z_loss: float):
  """Cross entropy plus `z_loss * log(Z)^2`, which keeps logits near log-probabilities.

  From logits and target distributions, both [B, T, V], to the loss per token with the
  auxiliary term, and that term alone, both [B, T].
  """
  cross_entropy = optax.losses.softmax_cross_entropy(logits, targets)
  auxiliary = z_loss * jnp.square(jax.scipy.special.logsumexp(logits, axis=-1))
  # T5X's gradient leaves the second output out (it is only logged).
  return cross_entropy + auxiliary, jax.lax.stop_gradient(auxiliary)


def compute_weighted_cross_entropy(
  logits: jnp.ndarray,
  targets: jnp.ndarray,
  weights: jnp.ndarray | None = None,
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
  loss_normalizing_factor: float | None = None,
) -> tuple[jnp.ndarray, jnp.ndarray, jnp.ndarray]:
  """Returns scalars: the loss of a batch (with z-loss), z-loss, sum of the weights.

  Logits are [B, T, V], targets and weights (None: ones) [B, T]. Label smoothing spreads
  that probability over the other tokens; the entropy of the smoothed target is
  subtracted, so that a perfect model has loss 0.
  """
  vocab_size = logits.shape[-1]
  on = 1.0 - label_smoothing
  off = label_smoothing / max(vocab_size - 1, 1)
  entropy = -(on * np.log(on) + (vocab_size - 1) * off * np.log(off + 1e-20))
  soft_targets = jax.nn.one_hot(targets, vocab_size) * (on - off) + off
  loss, auxiliary = cross_entropy_with_logits(logits, soft_targets, z_loss)
  weights = jnp.ones(targets.shape) if weights is None else weights
  factor = loss_normalizing_factor
  scale = weights if factor is None else weights / factor
  total, total_auxiliary = jnp.sum((loss - entropy) * scale), jnp.sum(auxiliary * scale)
  return total, total_auxiliary, jnp.sum(weights)


@enum.unique
class SpecialLossNormalizingFactor(enum.Enum):
  """Factors that depend on the batch: its real tokens, all tokens, or sequences."""

  NUM_REAL_TARGET_TOKENS = 1
  NUM_TOTAL_TARGET_TOKENS = 2
  AVERAGE_PER_SEQUENCE = 3


def get_loss_normalizing_factor_and_weights(
  loss_normalizing_factor: float | str | SpecialLossNormalizingFactor | None,
  batch: Mapping[str, jnp.ndarray],
):
  """Turns a factor, or the name of a special one, into a number and loss weights.

  Returns:
    The number (or None) and the loss weights [B, T] (or None).
  """
  factor, special = loss_normalizing_factor, SpecialLossNormalizingFactor
  weights = batch.get('decoder_loss_weights')
  if not isinstance(factor, str | special):
    return factor, weights
  name = factor.upper() if isinstance(factor, str) else factor.name
  if name not in special.__members__:
    raise ValueError(
      f'loss_normalizing_factor={factor!r} is unknown; choose a number, None or one '
      f'of {", ".join(special.__members__)}'
    )
  targets = batch['decoder_target_tokens']
  weights = (targets > 0).astype(jnp.float32) if weights is None else weights
  if special[name] is special.NUM_TOTAL_TARGET_TOKENS:
    return targets.size, weights
  if special[name] is special.AVERAGE_PER_SEQUENCE:
    ids = batch.get('decoder_segment_ids', jnp.zeros_like(targets))
    same = ids[:, :, None] == ids[:, None, :]
    # Of the weights in the sequence of each token.
    total = jnp.einsum('bts,bs->bt', same.astype(weights.dtype), weights)
    weights = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 0)
  return jnp.sum(weights), weights
