"""Times a training step: forward and backward pass, without the optimizer."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gqa_t5x.analysis import models
from gqa_t5x.analysis.benchmarks import timing, workload
from gqa_t5x.analysis.costs import formulas, products
from gqa_t5x.model import network

COLUMNS = {
  'model': 'model',
  'num_kv_heads': 'K',
  'kv_head_dim': 'R',
  'batch_size': 'batch',
  'input_length': 'input',
  'target_length': 'target',
  'ms_per_step': 'ms/step',
  'tokens_per_s': 'tokens/s',
  'gflop_per_s': 'GFLOP/s',
  'matmul_fraction': 'of products',
}


@dataclasses.dataclass(frozen=True)
class Setting:
  """What is trained: B examples of S and T tokens.

  Attributes:
    size, num_kv_heads, dtype, kv_head_dim: as of `models.config`.
    system: 'gqa_t5x', or 't5x': T5X's own network.
  """

  size: str
  num_kv_heads: int
  batch_size: int
  input_length: int
  target_length: int
  dtype: str
  system: str = 'gqa_t5x'
  kv_head_dim: int | None = None

  @property
  def config(self) -> network.T5Config:
    """The model's configuration."""
    return models.config(self.size, self.num_kv_heads, self.dtype, self.kv_head_dim)

  @property
  def cost(self) -> products.Products:
    """FLOPs and bytes of a step, by formula."""
    return formulas.training_step(
      self.config, self.batch_size, self.input_length, self.target_length
    )

  def nbytes(self) -> int:
    """Memory that it needs, in bytes: parameters, gradients, and what is kept.

    Of what products read and write in both passes the forward pass has a third, and
    keeps it for the backward pass.
    """
    return 8 * formulas.num_parameters(self.config) + self.cost.activation_bytes // 3

  def check(self) -> None:
    """Raises BadInput for what cannot be, or does not fit into memory."""
    workload.check_memory(self, f'target {self.target_length}')


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(module, params, inputs_BS, targets_BT):
  """Returns the loss and its gradients; no token is padding."""

  def loss(params):
    shifted_BT = jnp.pad(targets_BT[:, :-1], ((0, 0), (1, 0)))
    logits_BTV = module.apply(
      {'params': params}, inputs_BS, shifted_BT, targets_BT, enable_dropout=False
    )
    log_probs_BTV = jax.nn.log_softmax(logits_BTV)
    return -jnp.mean(jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], axis=-1))

  return jax.value_and_grad(loss)(params)


def measure(
  chosen: Sequence[Setting],
  repeats: int,
  command: str,
  others: Mapping[str, Callable[[network.T5Config], Any]] | None = None,
) -> Iterator[dict[str, Any]]:
  """Yields rows of kind 'train_benchmark'; see `benchmark.run`.

  `others` make the network of settings of other systems: 't5x'.
  """

  def make(setting):
    cfg = setting.config
    module = (others or {}).get(setting.system, network.Transformer)(cfg)
    params = workload.random_params(cfg, jnp.float32)
    rng = np.random.default_rng(0)
    batch = [
      jnp.asarray(rng.integers(2, cfg.vocab_size, (setting.batch_size, length)))
      for length in (setting.input_length, setting.target_length)
    ]
    step = functools.partial(loss_and_gradients, module, params, *batch)
    jax.block_until_ready(step())
    return functools.partial(timing.seconds, step)

  for together, steps in timing.in_groups(chosen, make):
    medians = timing.medians(steps, repeats)
    for setting, seconds in zip(together, medians, strict=True):
      yield _row(setting, seconds, command)


def _row(setting: Setting, seconds: float, command: str) -> dict[str, Any]:
  """Returns a row; `python -m gqa_t5x.benchmark train --help` explains its keys."""
  input_tokens = setting.batch_size * setting.input_length
  tokens = input_tokens + setting.batch_size * setting.target_length
  cfg = setting.config
  rate = workload.matmul_rate(cfg.emb_dim, cfg.mlp_dim, input_tokens, setting.dtype)
  return workload.common_keys('train_benchmark', command, vars(setting)) | {
    'ms_per_step': 1e3 * seconds,
    'tokens_per_s': tokens / seconds,
    'flops_per_step': setting.cost.flops,
    'gflop_per_s': 1e-9 * setting.cost.flops / seconds,
    'matmul_gflop_per_s': rate,
    'matmul_fraction': 1e-9 * setting.cost.flops / seconds / rate,
  }
