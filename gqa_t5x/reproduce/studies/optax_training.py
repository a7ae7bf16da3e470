"""Trains a small T5 in this process with any optimizer of optax.

The data are a seqio task's, packed. `Trainer` knows the task; a `State` is all that
training changes, and can be written and read.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax
import jax
import numpy as np
import optax
import tqdm
from etils import epath

from gqa_t5x import files, quiet
from gqa_t5x.model import network
from gqa_t5x.reproduce.experiments import trainings
from gqa_t5x.reproduce.experiments.trainings import Training
from gqa_t5x.reproduce.results import validation

Batch = Mapping[str, np.ndarray]
_SEED = 0
_SAVE_PERIOD = 500  # steps


class State(NamedTuple):
  """Parameters, what the optimizer keeps, and how many steps were taken."""

  params: Any
  optimizer: Any
  step: int = 0


class Trainer:
  """Trains and judges models of one task with one optimizer."""

  def __init__(self, training: Training):
    self.training = training
    task = _seqio().get_mixture_or_task(training.task)
    self._vocab_size = task.output_features['targets'].vocabulary.vocab_size
    self.optimizer = training.optimizer()
    self.validation = list(
      self.batches('validation', trainings.VALIDATION_BATCHES, None)
    )

  def config(self, **heads: int | None) -> network.T5Config:
    """The configuration of a model with heads of its own."""
    return network.config(trainings.SIZE, vocab_size=self._vocab_size, **heads)

  def batches(
    self, split: str, number: int, seed: int | None, first: int = 0
  ) -> Iterator[Batch]:
    """Yields so many packed batches from a first one on; without a seed, in order."""
    seqio = _seqio()
    dataset = seqio.get_dataset(
      self.training.task,
      dict(self.training.lengths),
      dataset_split=split,
      shuffle=seed is not None,
      seed=_SEED if seed is None else seed,  # Of the spans, too.
      num_epochs=None if seed is not None else 1,
      feature_converter=seqio.EncDecFeatureConverter(pack=True),
    )
    batched = dataset.batch(trainings.BATCH_SIZE, drop_remainder=True)
    yield from batched.skip(first).take(number).as_numpy_iterator()

  def start(self) -> State:
    """A model that has learned nothing, with all key/value heads."""
    (batch,) = self.batches('train', 1, _SEED)
    module = network.Transformer(self.config())
    inputs = {k: v for k, v in batch.items() if k != 'decoder_loss_weights'}
    init = jax.jit(lambda key: module.init(key, **inputs)['params'])
    params = init(jax.random.key(_SEED))
    return State(params, jax.jit(self.optimizer.init)(params))

  def train(
    self,
    state: State,
    until: int,
    seed: int = _SEED,
    first: int = 0,
    *,
    title: str = '',
    file: epath.Path | None = None,
    **heads: int | None,
  ) -> State:
    """Trains to a step.

    Args:
      until: the step.
      seed: of the order of the data, of which training at step `first` read nothing.
      title: of the progress bar; none without.
      file: where the state is kept on the way and at the end.
      **heads: of the model's configuration.
    """
    update = self._update(**heads)
    params, kept, step = state
    data = self.batches('train', until - step, seed, step - first)
    for batch in tqdm.tqdm(data, title, until, None, initial=step, disable=not title):
      params, kept = update(params, kept, batch)
      step += 1
      if file is not None and (step == until or not step % _SAVE_PERIOD):
        write(file, State(params, kept, step))
    return State(params, kept, step)

  @functools.cache  # noqa: B019 (a trainer is there as long as its study)
  def _update(self, **heads: int | None) -> Callable:
    """A compiled step: (params, what is kept, batch) -> both, new."""
    module = network.Transformer(self.config(**heads))

    def loss(params, batch):
      total, _, tokens = validation.sums(module, params, batch)
      return total / tokens

    @jax.jit
    def update(params, kept, batch):
      gradients = jax.grad(loss)(params, batch)
      updates, kept = self.optimizer.update(gradients, kept, params)
      return optax.apply_updates(params, updates), kept

    return update

  def loss(self, params: Any, **heads: int | None) -> float:
    """The cross-entropy on the validation batches, nats per target token."""
    module = network.Transformer(self.config(**heads))
    found = [validation.sums(module, params, batch) for batch in self.validation]
    total, _, tokens = np.sum(np.asarray(found, float), axis=0)
    return float(total / tokens)

  def fresh(self, state: State, params: Any) -> State:
    """A state with other parameters: what the optimizer kept of changed ones is lost.

    Parameters that are the same arrays as before, under the same names, keep theirs.
    """

    def same(path, new):
      old = state.params
      for key in path:
        old = old.get(key.key, {})
      return new is old

    unchanged = jax.tree_util.tree_map_with_path(same, params)
    paths = {p for p, x in jax.tree_util.tree_leaves_with_path(unchanged) if x}
    kept = dict(jax.tree_util.tree_leaves_with_path(state.optimizer))

    def choose(path, new):
      # The path of a parameter ends the path of what is kept of it.
      belongs = not path or not isinstance(path[-1], jax.tree_util.DictKey)
      names = tuple(k for k in path if isinstance(k, jax.tree_util.DictKey))
      return kept[path] if belongs or names in paths else new

    optimizer = jax.tree_util.tree_map_with_path(choose, self.optimizer.init(params))
    return State(params, optimizer, state.step)


def _seqio() -> Any:
  """Imports seqio, with this project's tasks, when it is needed."""
  quiet.import_tensorflow()
  import seqio

  import gqa_t5x.data.tasks  # noqa: F401 (registers them)

  return seqio


def write(path: epath.Path, state: State) -> None:
  """Writes a state, whole or not at all."""
  with files.whole(path) as temporary:
    temporary.write_bytes(flax.serialization.to_bytes(state._asdict()))


def read(path: epath.Path, like: State) -> State:
  """Reads a state of the same shapes."""
  return State(**flax.serialization.from_bytes(like._asdict(), path.read_bytes()))
