"""Splits of tasks, checked before they are read."""

import importlib

import seqio

from gqa_t5x.errors import BadInput


def known(task: str, split: str, module: str | None = None) -> str:
  """Returns the split that a run reads.

  Args:
    task: the name of a seqio task or mixture.
    split: of its data; TensorFlow Datasets names its own if there is no such split.
    module: what registers the task, if it is not registered yet.

  Raises:
    BadInput: the task, or each task of the mixture, lacks the split.
  """
  if module:
    importlib.import_module(module)
  sources = [t.source for t in seqio.get_subtasks(seqio.get_mixture_or_task(task))]
  if any(isinstance(source, seqio.TfdsDataSource) for source in sources):
    return split
  splits = sorted({name for source in sources for name in source.splits})
  if split not in splits:
    raise BadInput(f'{task} has no split {split!r}; choose one of {", ".join(splits)}.')
  return split
