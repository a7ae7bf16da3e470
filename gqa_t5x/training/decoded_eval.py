"""Evaluations by decoding while a model is trained, which SIGTERM ends.

They may take an hour, in which a machine that is taken away would be gone. The gin
files give `evaluator` to `t5x.train`.
"""

import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Any

import seqio
import tensorflow as tf

from gqa_t5x.training import trainer


def evaluator(
  evaluator_cls: Callable[..., seqio.Evaluator], **kwargs
) -> seqio.Evaluator:
  """Makes an evaluator that ends as `trainer.Trainer.eval` does.

  Args:
    evaluator_cls: seqio's.
    **kwargs: its arguments, which T5X gives.
  """
  made = evaluator_cls(**kwargs)
  evaluate = made.evaluate

  def until_stopped(**kwargs) -> tuple[Any, Any]:
    with trainer.Trainer.current.ended_by_sigterm() as batches_of:
      return evaluate(
        **{
          name: _through(batches_of, value) if callable(value) else value
          for name, value in kwargs.items()
        }
      )
    no_metrics = concurrent.futures.Future()
    no_metrics.set_result({})
    return no_metrics, {}

  made.evaluate = until_stopped
  return made


def _through(batches_of: Callable, infer: Callable) -> Callable:
  """Returns T5X's function of a dataset, whose batches go through `batches_of`."""
  return lambda dataset: infer(_Dataset(dataset, batches_of))


class _Dataset:
  """A `tf.data.Dataset` that is read through a function, and so is what is made of it.

  What TensorFlow runs may be ahead of the reader by any number of batches.
  """

  def __init__(self, dataset: tf.data.Dataset, batches_of: Callable):
    self._dataset, self._batches_of = dataset, batches_of

  def __len__(self) -> int:
    return len(self._dataset)

  def __getattr__(self, name: str) -> Any:
    value = getattr(self._dataset, name)

    def call(*args, **kwargs):
      plain = (x._dataset if isinstance(x, _Dataset) else x for x in args)
      result = value(*plain, **kwargs)
      is_dataset = isinstance(result, tf.data.Dataset)
      return _Dataset(result, self._batches_of) if is_dataset else result

    return call if callable(value) else value

  def as_numpy_iterator(self) -> Iterator[Any]:
    return self._batches_of(self._dataset.as_numpy_iterator())
