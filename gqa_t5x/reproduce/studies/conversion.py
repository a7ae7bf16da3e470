"""Rows of a study of conversion: what its runs left, as one JSON file."""

from collections.abc import Iterator, Sequence

import numpy as np

from gqa_t5x import files
from gqa_t5x.checkpoints import folders
from gqa_t5x.reproduce.experiments.models import MHA, Model
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.experiments.studies import STUDIES
from gqa_t5x.reproduce.results import events, rows, validation
from gqa_t5x.reproduce.results.rows import Row
from gqa_t5x.reproduce.studies import spectra, worth


def write(output_dir: str, study: str) -> None:
  """Writes the rows of a study from what its runs left.

  Args:
    output_dir: of all experiments.
    study: a key of studies.STUDIES.

  Raises:
    BadInput: of a run whose event files are damaged or not whole.
  """
  plan = Planner(STUDIES[study], output_dir)
  found = loss_rows(plan, plan.experiment.models)
  found += [unigram_row(plan), *worth_rows(plan), *_spectrum_rows(plan)]
  files.write_json(plan.rows, found)


def _common(plan: Planner, kind: str) -> Row:
  name = plan.experiment.name
  command = f'python -m gqa_t5x.reproduce run conversion --scale=local --study={name}'
  return rows.common(plan, kind, command)


def loss_rows(plan: Planner, models: Sequence[Model]) -> list[Row]:
  """Reads the validation loss of models, MHA among them, at every evaluated step.

  Returns:
    Rows of kind 'conversion'. `excess_loss` is over MHA at the end of pre-training,
    on the same batches; `alpha` the uptraining steps by those of pre-training.

  Raises:
    BadInput: of a run whose event files are damaged or not whole.
  """
  start, last = plan.pretrain_steps, plan.step(models[0].alpha)
  task = plan.value('uptrain', 'MIXTURE_OR_TASK_NAME')
  steps = [*range(start, last, plan.value('uptrain', 'EVAL_PERIOD')), last]
  losses = {
    model: events.validation_losses(plan.path_of(model).parent, task, steps)
    for model in models
  }
  (base, *_) = (found[start] for m, found in losses.items() if m.method == MHA)
  shared = _common(plan, 'conversion')
  return [
    {
      **shared,
      'method': model.method.name,
      'statistics': model.method.statistics,
      'grouping': model.method.grouping,
      'num_kv_heads': model.num_kv_heads,
      'seed': model.seed,
      'uptrain_steps': step - start,
      'alpha': (step - start) / start,
      'validation_loss': loss,
      'excess_loss': loss - base,
      'validation_batches': plan.value('uptrain', 'EVAL_STEPS'),
    }
    for model, found in losses.items()
    for step, loss in found.items()
  ]


def unigram_row(plan: Planner) -> Row:
  """Computes what a model that knows only how often each token occurs would lose.

  It is fitted to the validation targets themselves, so no unigram model does better.
  """
  num_batches = plan.value('uptrain', 'EVAL_STEPS')
  tokens = [
    batch['decoder_target_tokens'][batch['decoder_loss_weights'] > 0]
    for batch in validation.batches(plan, num_batches)
  ]
  counts = np.unique(np.concatenate(tokens), return_counts=True)[1]
  shares = counts / counts.sum()
  return {
    **_common(plan, 'unigram'),
    'validation_loss': float(-np.sum(shares * np.log(shares))),
    'validation_batches': num_batches,
  }


def worth_rows(plan: Planner) -> Iterator[Row]:
  """What attention is worth to the study's MHA model: see worth.rows."""
  size = plan.experiment.models[0].size
  params, architecture = folders.read_params(plan.pretraining(size).result)
  num_batches = plan.value('uptrain', 'EVAL_STEPS')
  batches = list(validation.batches(plan, num_batches))
  shared = _common(plan, 'worth') | {'validation_batches': num_batches}
  for row in worth.rows(
    params, lambda p: validation.loss(p, architecture, batches, size)[0]
  ):
    yield shared | row


def _spectrum_rows(plan: Planner) -> list[Row]:
  """The spectra of the study's MHA model: see spectra.rows."""
  models = plan.experiment.models
  source, statistics = plan.pretraining(models[0].size), plan.statistics(models[0].size)
  heads = tuple(dict.fromkeys(m.num_kv_heads for m in models if not m.is_mha))
  shared = _common(plan, 'spectrum')
  found = spectra.rows(source.result, statistics.result, heads)
  return [{**shared, **row} for row in found]
