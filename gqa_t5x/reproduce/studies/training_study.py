"""Conversion against training: what it costs models that were trained in several ways.

Each pre-training of `trainings.TRAININGS` is converted at its milestones by every
method. The paper's mean, svd and the latent form are trained on, and so is the model
that was not converted. All of it goes on where it was stopped.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from gqa_t5x import files
from gqa_t5x.checkpoints.config import ModelConfig
from gqa_t5x.conversion import (
  input_statistics,
  input_sums,
  output_refit,
  output_sums,
  plan,
)
from gqa_t5x.inference import saved
from gqa_t5x.model import network
from gqa_t5x.reproduce.experiments import trainings
from gqa_t5x.reproduce.experiments.models import MEAN, METHODS, MHA, SVD
from gqa_t5x.reproduce.experiments.targets import training_file
from gqa_t5x.reproduce.results.rows import Row, measured
from gqa_t5x.reproduce.studies import optax_training, spectra, worth
from gqa_t5x.reproduce.studies.heads import JOINT, LATENT, Variant, joint
from gqa_t5x.reproduce.studies.optax_training import State, Trainer

NUM_KV_HEADS = (4, 2, 1)  # of 8
VARIANTS = (*map(Variant, METHODS), Variant(SVD, refit_outputs=True), LATENT, JOINT)
UPTRAINED = (Variant(MEAN), Variant(SVD), Variant(SVD, refit_outputs=True), LATENT)
_UPTRAIN_SEED = 1  # other batches than pre-training began with


def write(output_dir: str) -> None:
  """Writes the rows into the folder of all results; BadInput if it cannot be read."""
  result = training_file(epath.Path(output_dir))
  folder = result.parent / result.stem
  rows: list[Row] = []
  for name in trainings.TRAININGS:
    for milestone in pretrain(name, folder):
      rows += milestone.rows()
  files.write_json(result, rows)


def pretrain(name: str, folder: epath.Path) -> Iterator['Milestone']:
  """Trains as `trainings.TRAININGS[name]` says; yields the model at each milestone."""
  trainer = Trainer(trainings.TRAININGS[name])
  (folder / name).mkdir(parents=True, exist_ok=True)
  state = trainer.start()
  for steps in trainer.training.steps:
    done, running = (folder / name / f'{x}.msgpack' for x in (steps, 'running'))
    if done.exists():
      state = optax_training.read(done, state)
    else:
      if running.exists():
        state = optax_training.read(running, state)
      title = f'{trainer.training.title}, {steps:,} steps'
      state = trainer.train(state, steps, title=title, file=running)
      optax_training.write(done, state)
    yield Milestone(trainer, state, folder / name / str(steps))


class Milestone:
  """A pre-trained model, and what conversion makes of it."""

  def __init__(self, trainer: Trainer, state: State, folder: epath.Path):
    """`folder` keeps its checkpoint, its statistics, and rows as they are made."""
    self.trainer, self.folder = trainer, folder
    params = jax.tree.map(np.asarray, state.params)
    self.state = state._replace(params=params)
    self._checkpoint = folder / f'checkpoint_{state.step}'
    self._statistics = folder / 'statistics.npz'
    self._base: float | None = None

  def rows(self) -> list[Row]:
    """Rows of kinds 'training' (losses), 'training_worth' and 'training_spectrum'."""
    self.folder.mkdir(exist_ok=True)
    if not self._checkpoint.exists():
      step = self.state.step
      saved.write(self._checkpoint, self.state.params, step, ModelConfig(), None)
    if not self._statistics.exists():
      self._calibrate()
    rows = self._kept('mha', self._rows_of, Variant(MHA), 8)
    rows += self._kept('worth', self._worth)
    for K in NUM_KV_HEADS:
      for variant in VARIANTS:
        similar = variant.method.grouping != 'contiguous'
        if K > 1 or variant.joint or not (variant.latent or similar):
          title = f'{variant.title}, {K}'
          rows += self._kept(title, self._rows_of, variant, K)
    return rows + self._kept('spectra', self._spectra)

  def _kept(self, name: str, make: Any, *args: Any) -> list[Row]:
    """Rows that are there already, or made and kept."""
    file = self.folder / f'{name.replace(" ", "_").replace(",", "")}.json'
    if not file.exists():
      files.write_json(file, list(make(*args)))
    return json.loads(file.read_text())

  def _common(self, kind: str) -> Row:
    training = self.trainer.training
    return measured(kind, 'python -m gqa_t5x.reproduce run training --scale=local') | {
      'size': trainings.SIZE,
      'training': training.title,
      'task': training.task,
      'pretrain_steps': self.state.step,
      'batch_size': trainings.BATCH_SIZE,
      'validation_batches': trainings.VALIDATION_BATCHES,
      'input_length': training.lengths['inputs'],
      'output_length': training.lengths['targets'],
    }

  def _calibrate(self) -> None:
    """Collects statistics on the training split."""
    module = network.Transformer(self.trainer.config())
    totals, info = self._add_up(
      lambda params, batch: input_sums.sum_inputs(module, params, batch, False),
      self.state.params,
    )
    statistics = input_sums.mean_statistics(totals)
    input_statistics.write_statistics(self._statistics, statistics, info)

  def _refit(self, params: Any, heads: Mapping[str, int]) -> Any:
    """Refits the outputs of converted parameters on the same data."""
    original = network.Transformer(self.trainer.config())
    config = self.trainer.config(**heads)
    totals, info = self._add_up(
      lambda old, new, b: output_sums.sum_outputs(original, old, config, new, b),
      self.state.params,
      params,
    )
    sums = self.folder / 'sums.npz'
    output_refit.write_sums(sums, input_sums.means(totals), info)
    return plan.convert_params(params, refit_outputs=str(sums))

  def _add_up(
    self, function: Callable[..., Any], *params: Any
  ) -> tuple[dict, dict[str, Any]]:
    """Adds up a function of parameters and each calibration batch; counts tokens."""
    totals, compiled = {}, jax.jit(function)
    for batch in self.trainer.batches(
      'train', trainings.CALIBRATION_BATCHES, _UPTRAIN_SEED
    ):
      input_sums.add_sums(totals, compiled(*params, batch))
    tokens = {stack: int(totals[stack]) for stack in ('encoder', 'decoder')}
    return totals, {'num_tokens': tokens}

  def _rows_of(self, variant: Variant, K: int) -> Iterator[Row]:
    """The loss right after conversion, and of some variants after uptraining."""
    params, heads = self._convert(variant, K)
    state, steps = self.trainer.fresh(self.state, params), [self.state.step]
    if variant in UPTRAINED or variant.method == MHA:
      steps += [round((1 + alpha) * steps[0]) for alpha in trainings.UPTRAINED]
    for step in steps:
      state = self.trainer.train(state, step, _UPTRAIN_SEED, steps[0], **heads)
      loss = self.trainer.loss(state.params, **heads)
      yield self._common('training') | {
        'variant': variant.title,
        'cache_heads': K,
        **heads,
        'uptrain_steps': step - steps[0],
        'alpha': (step - steps[0]) / steps[0],
        'validation_loss': loss,
        'excess_loss': loss - self._base_loss(),
      }

  def _base_loss(self) -> float:
    if self._base is None:
      self._base = self.trainer.loss(self.state.params)
    return self._base

  def _convert(self, variant: Variant, K: int) -> tuple[Any, Mapping[str, int]]:
    """Returns (parameters, what their configuration says of heads)."""
    if variant.method == MHA:
      return self.state.params, {}
    if variant.joint:
      return self._joint(2 * K * self.trainer.config().head_dim), {}
    name, used, grouping = variant.method
    heads = {'num_kv_heads': K}
    if variant.latent:
      heads = {'num_kv_heads': 1, 'kv_head_dim': K * self.trainer.config().head_dim}
    statistics = str(self._statistics) if used == 'calibrated' else None
    params = plan.convert_params(
      self.state.params, method=name, statistics=statistics, grouping=grouping, **heads
    )
    if variant.refit_outputs:
      params = self._refit(params, heads)
    return params, heads

  def _joint(self, rank: int) -> Any:
    """The decoder as if each module kept `rank` numbers, of which keys and values are.

    The parameters are those of MHA: the function is the same.
    """
    statistics = input_statistics.open_statistics(self._statistics)
    decoder = dict(self.state.params['decoder'])
    for name, kind in itertools.product(list(decoder), worth.MODULES.values()):
      if name.startswith('layers_'):
        kernels = {n: x['kernel'] for n, x in decoder[name][kind].items()}
        inputs = statistics.read(f'decoder/{name}/{kind}')
        new = joint(kernels, self.trainer.config().head_dim, inputs, rank)
        attention = {n: {'kernel': x} for n, x in new.items()}
        decoder[name] = {**decoder[name], kind: attention}
    return {**self.state.params, 'decoder': decoder}

  def _worth(self) -> Iterator[Row]:
    for row in worth.rows(self.state.params, self.trainer.loss):
      yield self._common('training_worth') | row

  def _spectra(self) -> Iterator[Row]:
    """What does not fit into shared heads: see `spectra.rows`."""
    shared = self._common('training_spectrum')
    H, latents = self.trainer.config().head_dim, NUM_KV_HEADS[:-1]
    found = spectra.rows(self._checkpoint, self._statistics, NUM_KV_HEADS, latents)
    for row in found:
      K = row['num_kv_heads'] * row.get('kv_head_dim', H) // H
      yield {**shared, **row, 'cache_heads': K}
