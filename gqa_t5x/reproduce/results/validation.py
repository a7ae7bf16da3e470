"""The validation split of the local data, and the loss of a checkpoint on it."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gqa_t5x import quiet
from gqa_t5x.checkpoints.tree import Architecture
from gqa_t5x.model import network
from gqa_t5x.reproduce.experiments.planner import Planner


def batches(plan: Planner, num_batches: int) -> Iterator[dict[str, np.ndarray]]:
  """Yields the packed validation batches that T5X's training evaluation begins with."""
  quiet.import_tensorflow()
  import seqio

  import gqa_t5x.data.tasks  # noqa: F401 (registers the task)

  dataset = seqio.get_dataset(
    plan.value('pretrain', 'MIXTURE_OR_TASK_NAME'),
    plan.value('pretrain', 'TASK_FEATURE_LENGTHS'),
    dataset_split='validation',
    shuffle=False,
    seed=42,
    feature_converter=seqio.EncDecFeatureConverter(pack=True),
  )
  batched = dataset.batch(plan.value('pretrain', 'BATCH_SIZE'), drop_remainder=True)
  yield from batched.take(num_batches).as_numpy_iterator()


def loss(
  params: dict[str, Any],
  architecture: Architecture,
  batches: Sequence[dict[str, np.ndarray]],
  size: str,
) -> tuple[float, float]:
  """Returns cross-entropy (nats) and accuracy of a model, per target token."""
  K, V = architecture.num_kv_heads['self_attention'], architecture.vocab_size
  config = network.config(size, num_kv_heads=K, vocab_size=V)
  module = network.Transformer(config)
  total = sum(np.asarray(sums(module, params, b), np.float64) for b in batches)
  return float(total[0] / total[2]), float(total[1] / total[2])


@functools.partial(jax.jit, static_argnums=0)
def sums(module, params, batch):
  """Sums of cross-entropy, correct tokens and tokens over a batch, [3]."""
  weights = batch['decoder_loss_weights']
  inputs = {k: v for k, v in batch.items() if k != 'decoder_loss_weights'}
  logits = module.apply({'params': params}, **inputs, enable_dropout=False)
  targets = batch['decoder_target_tokens']
  log_probs = jax.nn.log_softmax(logits)
  losses = -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
  correct = jnp.argmax(logits, axis=-1) == targets
  return jnp.stack([jnp.sum(x * weights) for x in (losses, correct, 1.0)])
