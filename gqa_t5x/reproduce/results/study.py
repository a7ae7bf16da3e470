"""Rows of a study of conversion: what its runs left, as one JSON file."""

from collections.abc import Sequence

import numpy as np

from gqa_t5x import files
from gqa_t5x.reproduce.experiments.models import PRETRAINED, Model
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.experiments.studies import STUDIES
from gqa_t5x.reproduce.results import events, miniature, rows, spectra
from gqa_t5x.reproduce.results.rows import Row


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
  files.write_json(plan.rows, [*found, unigram_row(plan), *spectrum_rows(plan)])


def common(plan: Planner) -> Row:
  """Returns what every row of a study says of its run."""
  lengths = plan.value('uptrain', 'TASK_FEATURE_LENGTHS')
  return {
    'source': 'measured',
    'command': 'python -m gqa_t5x.reproduce run conversion --scale=local'
    f' --study={plan.experiment.name}',
    'size': plan.experiment.models[0].size,
    'pretrain_steps': plan.pretrain_steps,
    'batch_size': plan.value('uptrain', 'BATCH_SIZE'),
    'input_length': lengths['inputs'],
    'output_length': lengths['targets'],
    **rows.environment(),
  }


def loss_rows(plan: Planner, models: Sequence[Model]) -> list[Row]:
  """Reads the validation loss of models at every evaluated step.

  Args:
    plan: of the study.
    models: its models; MHA is among them.

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
  base = next(
    found[start] for model, found in losses.items() if model.method == PRETRAINED
  )
  shared = {'kind': 'conversion', **common(plan)}
  return [
    {
      **shared,
      'method': model.method,
      'statistics': model.statistics,
      'grouping': model.grouping,
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

  Args:
    plan: of the study.

  Returns:
    A row of kind 'unigram'.
  """
  names = ('TASK_FEATURE_LENGTHS', 'BATCH_SIZE', 'EVAL_STEPS')
  batches = miniature.validation_batches(*(plan.value('uptrain', n) for n in names))
  tokens = [
    batch['decoder_target_tokens'][batch['decoder_loss_weights'] > 0]
    for batch in batches
  ]
  return {
    'kind': 'unigram',
    **common(plan),
    'validation_loss': entropy(np.concatenate(tokens)),
    'validation_batches': plan.value('uptrain', 'EVAL_STEPS'),
  }


def entropy(tokens: np.ndarray) -> float:
  """Returns the entropy of the tokens' own distribution, nats per token."""
  shares = np.unique(tokens, return_counts=True)[1] / tokens.size
  return float(-np.sum(shares * np.log(shares)))


def spectrum_rows(plan: Planner) -> list[Row]:
  """Describes the spectra of the study's MHA model: see spectra.rows."""
  models = plan.experiment.models
  source, statistics = plan.pretraining(models[0].size), plan.statistics(models[0].size)
  heads = tuple(dict.fromkeys(m.num_kv_heads for m in models if not m.is_mha))
  shared = {'kind': 'spectrum', **common(plan)}
  found = spectra.rows(source.result, statistics.result, heads)
  return [{**shared, **row} for row in found]
