"""Where the results of an experiment are, and the commands that lead to them.

A model is pre-trained, converted, uptrained, fine-tuned, timed. Each of these is a
stage; what several experiments need is one stage, made once.
"""

import collections
import dataclasses
from typing import Any

from etils import epath

from gqa_t5x.reproduce.experiments import commands, estimates, gin_files
from gqa_t5x.reproduce.experiments.experiment import Experiment, Timing
from gqa_t5x.reproduce.experiments.models import MHA, RANDOM, SCRATCH, Model, mha
from gqa_t5x.reproduce.runner import stages
from gqa_t5x.reproduce.runner.stages import Stage

WMT = 'wmt14_en_de_shazeer'  # Shazeer's task


class Planner:
  """Describes the stages of one experiment, and collects those that are wanted.

  A method named after a stage returns it, with all that it needs, and changes nothing:
  its `result` says where a result is, whether it was made or not. `require` adds
  stages to the plan.
  """

  def __init__(
    self, experiment: Experiment, output_dir: str, tfds_data_dir: str | None = None
  ):
    """Collects nothing yet.

    Args:
      experiment: which models, and how they are made.
      output_dir: folder of all results, local or gs://; the experiment's is below it.
      tfds_data_dir: of TensorFlow Datasets, where it is not the default.
    """
    self.experiment, self.output_dir = experiment, epath.Path(output_dir)
    self.folder = self.output_dir / experiment.folder
    # The folder of TensorFlow Datasets, as a flag of gqa_t5x.data's commands.
    self.data_flags = [f'--data_dir={tfds_data_dir}'] if tfds_data_dir else []
    data_dir = [f'--tfds_data_dir={tfds_data_dir}'] if tfds_data_dir else []
    self._flags = [*experiment.flags, *data_dir]
    self._stages: dict[Any, Stage] = {}

  # --- The plan -----------------------------------------------------------------

  @property
  def stages(self) -> list[Stage]:
    """What is required so far, in an order that can be run."""
    return list(self._stages.values())

  def missing(self) -> list[Stage]:
    """Returns the stages of the plan whose results are not there yet."""
    return stages.missing(self.stages)

  def require(self, *wanted: Stage) -> None:
    """Adds stages, and before them what they need, unless it is there."""
    for stage in wanted:
      self._add(stage)

  def _add(self, stage: Stage) -> Stage:
    """Adds a stage; returns the one of the plan that makes its result.

    T5's schedule does not depend on the last step, so a run passes every smaller alpha
    on its way, and a longer run goes on where a shorter one has ended.
    """
    if not stage.command or stage.result in self._stages:
      return self._stages.get(stage.result, stage)
    needs = [self._add(need) for need in stage.needs]
    runs = [run for run in self.stages if _in_one_run(run, stage)]
    for run in runs:
      if step_of(run.result) >= step_of(stage.result):
        return run
    work = stage.work - sum(run.work for run in runs)
    self._stages[stage.result] = dataclasses.replace(
      stage,
      needs=(*(need for need in needs if need.command), *runs),
      reads=(*(str(n.result) for n in needs if not n.command), *stage.reads),
      work=work,
      hours=stage.hours and stage.hours * (work / stage.work),
    )
    return self._stages[stage.result]

  # --- Numbers ------------------------------------------------------------------

  def value(self, kind: str, name: str, task: str = '') -> Any:
    """Returns a macro's value as a kind of run, a key of `gin_files`, has it."""
    files = reversed(self.experiment.gin_files[kind])
    read = (
      gin_files.macros(file.format(task=task)) for file in files if '{model' not in file
    )
    return collections.ChainMap(self.experiment.macros.get(kind, {}), *read)[name]

  @property
  def pretrain_steps(self) -> int:
    """Steps of pre-training."""
    return self.value('pretrain', 'TRAIN_STEPS')

  def step(self, alpha: float) -> int:
    """Returns the step of a checkpoint that is uptrained so far."""
    return self.pretrain_steps + round(alpha * self.pretrain_steps)

  # --- Checkpoints --------------------------------------------------------------

  def path_of(self, model: Model) -> Any:
    """Returns where a model's checkpoint is, or will be."""
    return self.checkpoint(model).result

  def checkpoint(self, model: Model) -> Stage:
    """The last stage of a model before it is fine-tuned."""
    if model.method == SCRATCH:
      return self.from_scratch(model)
    if model.alpha:
      return self.uptraining(model)
    return self.conversion(model)

  def pretraining(self, size: str) -> Stage:
    """The MHA model that all others come from; a public one is given."""
    names, steps = self.experiment.names, self.pretrain_steps
    path = names.pretrained.format(model=mha(size), step=steps)
    if self.experiment.public:
      return Stage('public checkpoint', epath.Path(path), command=())
    result, files = self.folder / path, self.experiment.gin_files['pretrain']
    macros = {'MODEL_DIR': result.parent}
    return Stage(
      f'pre-train MHA, {steps:,} steps',
      result,
      commands.engine('t5x.train', files, self.experiment.flags, **macros),
      work=steps,
    )

  def from_scratch(self, model: Model) -> Stage:
    """A model that has few heads from the first step."""
    steps = self.pretrain_steps
    folder = self.folder / 'pretrained' / model.name
    return self._training(
      f'pre-train {model.label} from scratch, {steps:,} steps',
      folder / f'checkpoint_{steps}',
      'pretrain',
      model,
      _heads(model) | {'MODEL_DIR': folder},
      steps=steps,
    )

  def statistics(self, size: str) -> Stage:
    """The statistics of a pre-trained model's inputs, for conversion."""
    source, names = self.pretraining(size), self.experiment.names
    facts = {'model': mha(size), 'step': step_of(source.result)}
    result = self.folder / names.statistics.format(**facts)
    macros = {'CHECKPOINT_PATH': source.result, 'OUTPUT': result}
    macros |= self.experiment.macros.get('calibrate', {})
    return Stage(
      names.statistics_title.format(**facts),
      result,
      self._engine('gqa_t5x.calibrate', 'calibrate', mha(size), **macros),
      needs=(source,),
      reads=self._data('pretrain'),
    )

  def conversion(self, model: Model) -> Stage:
    """A model right after conversion; of MHA, the one pre-trained."""
    source, names = self.pretraining(model.size), self.experiment.names
    if model.method == MHA:
      return source
    path = names.converted.format(model=model, step=step_of(source.result))
    result = self.folder / path
    method = model.method
    calibrated = method.statistics == 'calibrated'
    statistics = [self.statistics(model.size)] if calibrated else []
    command = commands.module(
      'gqa_t5x.convert',
      input=source.result,
      output=result.parent,
      num_kv_heads=model.num_kv_heads,
      kv_head_dim=model.kv_head_dim,
      method=method.name,
      statistics=statistics[0].result if calibrated else None,
      grouping=None if method.grouping == 'contiguous' else method.grouping,
      seed=model.seed if method == RANDOM else None,
    )
    title = names.convert_title.format(model=model)
    return Stage(title, result, command, needs=(source, *statistics))

  def uptraining(self, model: Model) -> Stage:
    """A model after uptraining, from its conversion on."""
    source, last = self.conversion(model), self.step(model.alpha)
    names = self.experiment.names
    result = self.folder / names.uptrained.format(model=model, step=last)
    macros = _heads(model) | {
      'MODEL_DIR': result.parent,
      'INITIAL_CHECKPOINT_PATH': source.result,
      'TRAIN_STEPS': last,
      'RANDOM_SEED': model.seed,
    }
    return self._training(
      names.uptrain_title.format(model=model),
      result,
      'uptrain',
      model,
      {name: macros[name] for name in self.experiment.given if name in macros},
      steps=last - self.pretrain_steps,
      needs=(source,),
    )

  def finetuning(self, model: Model, task: str, seed: int) -> Stage:
    """A model fine-tuned on a task, evaluated on the way."""
    source = self.checkpoint(model)
    steps = self.value('finetune', 'FINETUNE_STEPS', task)
    folder = self.folder / 'finetuned' / model.name / task / f'seed{seed}'
    macros = {} if model.is_mha else _heads(model)
    macros |= {'MODEL_DIR': folder, 'INITIAL_CHECKPOINT_PATH': source.result}
    return self._training(
      f'fine-tune {model.label} on {task}, seed {seed}',
      folder / f'checkpoint_{step_of(source.result) + steps}',
      'finetune',
      model,
      macros | {'RANDOM_SEED': seed},
      steps=steps,
      task=task,
      needs=(source,),
    )

  # --- Scores and times ---------------------------------------------------------

  def vocabulary(self) -> Stage:
    """The vocabulary of Shazeer's models."""
    result = self.folder / 'translated' / 'vocabulary.model'
    words = (f'--output={result}', *self.data_flags)
    command = commands.module('gqa_t5x.data.wmt_vocabulary', *words)
    return Stage('train the vocabulary of WMT14', result, command, reads=(WMT,))

  def translation(self, size: str) -> Stage:
    """One of Shazeer's models, trained on WMT14."""
    last = gin_files.macro('gin/runs/translate.gin', 'TRAIN_STEPS')
    folder, vocabulary = self.folder / 'translated' / size, self.vocabulary()
    files = [f'gin/models/{size}.gin', f'gin/tasks/{WMT}.gin', 'gin/runs/translate.gin']
    macros = {'MODEL_DIR': folder, 'VOCABULARY_FILE': vocabulary.result}
    return Stage(
      f'train {size} on WMT14, {last:,} steps',
      folder / f'checkpoint_{last}',
      commands.engine('t5x.train', files, self._flags, **macros),
      needs=(vocabulary,),
      reads=(WMT,),
      work=last,
    )

  def translation_scores(self, size: str, beams: int) -> Stage:
    """The scores of one of Shazeer's models on the test set, as seqio writes them."""
    trained, vocabulary = self.translation(size), self.vocabulary()
    folder = self.folder / 'translated' / f'{size}_test_beam{beams}'
    files = [f'gin/models/{size}.gin', f'gin/tasks/{WMT}.gin', 'gin/runs/eval.gin']
    files += ['gin/decoding/beam_search.gin'] if beams > 1 else []
    macros = {
      'CHECKPOINT_PATH': trained.result,
      'SPLIT': 'test',
      'EVAL_OUTPUT_DIR': folder,
      'VOCABULARY_FILE': vocabulary.result,
    }
    return Stage(
      f'translate the test set by {size}, {beams} beam{"s" * (beams > 1)}',
      folder / 'inference_eval' / f'{WMT}-metrics.jsonl',
      commands.engine('t5x.eval', files, self._flags, **macros),
      needs=(vocabulary, trained),
      reads=(WMT,),
    )

  def timing(self, name: str, timing: Timing) -> Stage:
    """Rows of `gqa_t5x.benchmark decode`."""
    result = self.folder / 'benchmark' / f'{name}.json'
    flags = timing.flags()
    command = commands.module('gqa_t5x.benchmark', 'decode', **flags, json=result)
    return Stage(f'time {name}', result, command, alone=True)

  @property
  def rows(self) -> Any:
    """Where the rows are of an experiment that compares its own models."""
    return self.folder / 'rows.json'

  # --- Inside -------------------------------------------------------------------

  def _training(
    self,
    title: str,
    result: Any,
    kind: str,
    model: Model,
    given: dict[str, Any],
    *,
    steps: int,
    task: str = '',
    needs: tuple[Stage, ...] = (),
  ) -> Stage:
    """A stage that trains; `given` are added to the macros of the kind and the size."""
    experiment = self.experiment
    size_macros = experiment.size_macros.get(model.size, {})
    macros = {**experiment.macros.get(kind, {}), **size_macros, **given}
    return Stage(
      title,
      result,
      self._engine('t5x.train', kind, model, task, **macros),
      needs=needs,
      reads=self._data(kind, task),
      leftover=result.parent if kind in experiment.begin_anew else None,
      work=steps,
      hours=self._hours(kind, model, steps, task) if experiment.chip else None,
      macros=macros,
    )

  def _engine(
    self, module: str, kind: str, model: Model, task: str = '', **macros: Any
  ) -> tuple[str, ...]:
    """The command of a kind of run."""
    experiment = self.experiment
    files = experiment.gin_files[kind] + experiment.size_files.get(model.size, ())
    files = [file.format(model=model, task=task) for file in files]
    return commands.engine(module, files, self._flags, **macros)

  def _data(self, kind: str, task: str = '') -> tuple[str, ...]:
    """The data set that a kind of run reads."""
    if self.experiment.chip is None:
      return ()
    return (task or self.value(kind, 'MIXTURE_OR_TASK_NAME'),)

  def _hours(self, kind: str, model: Model, steps: int, task: str) -> float:
    lengths = self.value(kind, 'TASK_FEATURE_LENGTHS', task)
    batch_size = self.value(kind, 'BATCH_SIZE', task)
    run = estimates.Run(
      model.size,
      model.num_kv_heads,
      self.experiment.chip,
      batch_size,
      lengths['inputs'],
      lengths['targets'],
      model.kv_head_dim,
    )
    hours = run.training_hours(steps)
    if task:
      evaluations = steps // self.value(kind, 'EVAL_PERIOD', task)
      examples = evaluations * self.experiment.tasks[task]
      hours += run.decoding_hours(examples)
    return hours


def _heads(model: Model) -> dict[str, int]:
  """The macros of a model's key/value heads."""
  heads = {'NUM_KV_HEADS': model.num_kv_heads}
  return heads | ({'KV_HEAD_DIM': model.kv_head_dim} if model.kv_head_dim else {})


def step_of(checkpoint: Any) -> int:
  """Returns the step of a checkpoint, which its name ends in."""
  return int(checkpoint.name.removeprefix('checkpoint_'))


def _in_one_run(a: Stage, b: Stage) -> bool:
  """Whether two stages leave checkpoints in one folder."""
  names = a.result.name, b.result.name
  return a.result.parent == b.result.parent and all(
    name.startswith('checkpoint_') and '.' not in name for name in names
  )
