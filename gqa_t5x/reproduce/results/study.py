"""Rows of the conversion study: what its runs left, as one JSON file."""

import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np

from gqa_t5x import files
from gqa_t5x.reproduce.experiments.models import PRETRAINED, Model
from gqa_t5x.reproduce.experiments.planner import Planner
from gqa_t5x.reproduce.experiments.studies import STUDIES
from gqa_t5x.reproduce.results import events, miniature, rows, spectra
from gqa_t5x.reproduce.results.rows import Row


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What all models of a study are evaluated on, and when.

  Attributes:
    study: a key of studies.STUDIES.
    size: a key of sizes.SIZES.
    task: seqio task; its validation split is used.
    lengths: tokens of inputs and targets.
    batch_size: packed rows a batch.
    num_batches: the first so many batches.
    steps: the first is the end of pre-training, the last that of uptraining.
  """

  study: str
  size: str
  task: str
  lengths: Mapping[str, int]
  batch_size: int
  num_batches: int
  steps: list[int]

  def common(self) -> Row:
    """Returns what every row says of its run."""
    return {
      'source': 'measured',
      'command': 'python -m gqa_t5x.reproduce run conversion --scale=local'
      f' --study={self.study}',
      'size': self.size,
      'pretrain_steps': self.steps[0],
      'batch_size': self.batch_size,
      'input_length': self.lengths['inputs'],
      'output_length': self.lengths['targets'],
      **rows.environment(),
    }


def loss_rows(runs: Mapping[Model, pathlib.Path], evaluation: Evaluation) -> list[Row]:
  """Reads the validation loss of every model at every evaluated step.

  Args:
    runs: model -> model_dir of its uptraining; MHA is among them.
    evaluation: what was evaluated.

  Returns:
    Rows of kind 'conversion'. `excess_loss` is over MHA at the end of pre-training,
    on the same batches; `alpha` the uptraining steps by those of pre-training.

  Raises:
    BadInput: of a run whose event files are damaged or not whole.
  """
  losses = {
    model: events.validation_losses(model_dir, evaluation.task, evaluation.steps)
    for model, model_dir in runs.items()
  }
  start = evaluation.steps[0]
  base = next(
    found[start] for model, found in losses.items() if model.method == PRETRAINED
  )
  common = evaluation.common()
  return [
    {
      'kind': 'conversion',
      **common,
      'method': model.method,
      'statistics': model.statistics,
      'grouping': model.grouping,
      'num_kv_heads': model.num_kv_heads,
      'seed': model.seed,
      'uptrain_steps': step - start,
      'alpha': (step - start) / start,
      'validation_loss': loss,
      'excess_loss': loss - base,
      'validation_batches': evaluation.num_batches,
    }
    for model, found in losses.items()
    for step, loss in found.items()
  ]


def unigram_row(evaluation: Evaluation) -> Row:
  """Computes what a model that knows only how often each token occurs would lose.

  It is fitted to the validation targets themselves, so no unigram model does better.

  Args:
    evaluation: what the models are evaluated on.

  Returns:
    A row of kind 'unigram'.
  """
  batches = miniature.validation_batches(
    evaluation.lengths, evaluation.batch_size, evaluation.num_batches
  )
  tokens = np.concatenate(
    [
      batch['decoder_target_tokens'][batch['decoder_loss_weights'] > 0]
      for batch in batches
    ]
  )
  return {
    'kind': 'unigram',
    **evaluation.common(),
    'validation_loss': entropy(tokens),
    'validation_batches': evaluation.num_batches,
  }


def entropy(tokens: np.ndarray) -> float:
  """Returns the entropy of the tokens' own distribution, nats per token."""
  shares = np.unique(tokens, return_counts=True)[1] / tokens.size
  return float(-np.sum(shares * np.log(shares)))


def spectrum_rows(
  source: pathlib.Path,
  statistics: pathlib.Path,
  num_kv_heads: tuple[int, ...],
  evaluation: Evaluation,
) -> list[Row]:
  """Describes the spectra of the MHA model: see spectra.rows.

  Args:
    source: its checkpoint.
    statistics: its file of statistics.
    num_kv_heads: the K to look at.
    evaluation: gives what all rows have.
  """
  common = {'kind': 'spectrum', **evaluation.common()}
  return [{**common, **row} for row in spectra.rows(source, statistics, num_kv_heads)]


def write(output_dir: str, study: str) -> None:
  """Writes the rows of a study from what its runs left.

  Args:
    output_dir: of all experiments.
    study: a key of studies.STUDIES.

  Raises:
    BadInput: of a run whose event files are damaged or not whole.
  """
  plan = Planner(STUDIES[study], output_dir)
  models, size = plan.experiment.models, plan.experiment.models[0].size
  first, last = plan.pretrain_steps, plan.step(models[0].alpha)
  evaluation = Evaluation(
    study=study,
    size=size,
    task=plan.value('uptrain', 'MIXTURE_OR_TASK_NAME'),
    lengths=plan.value('uptrain', 'TASK_FEATURE_LENGTHS'),
    batch_size=plan.value('uptrain', 'BATCH_SIZE'),
    num_batches=plan.value('uptrain', 'EVAL_STEPS'),
    steps=[*range(first, last, plan.value('uptrain', 'EVAL_PERIOD')), last],
  )
  runs = {model: plan.path_of(model).parent for model in models}
  found = [*loss_rows(runs, evaluation), unigram_row(evaluation)]
  heads = tuple(dict.fromkeys(m.num_kv_heads for m in models if not m.is_mha))
  found += spectrum_rows(
    plan.pretraining(size).result, plan.statistics(size).result, heads, evaluation
  )
  files.write_json(plan.rows, found)
