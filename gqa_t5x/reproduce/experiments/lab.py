"""Where the results of the experiments are, and the commands that lead to them.

A model is pre-trained, converted, uptrained, fine-tuned, timed. Each of these is a
stage; what several experiments need is one stage, made once.
"""

from typing import Any

from etils import epath

from gqa_t5x.model import sizes
from gqa_t5x.reproduce.experiments import commands, conversion, estimates
from gqa_t5x.reproduce.experiments.gin_macros import macro
from gqa_t5x.reproduce.experiments.models import PRETRAINED, SCRATCH, Model
from gqa_t5x.reproduce.experiments.scales import Scale, Timing
from gqa_t5x.reproduce.runner.stages import Stage

TRANSLATE_TASK = 'gin/tasks/wmt14_en_de_shazeer.gin'
STUDY = 'quick'  # the study of conversion whose pre-trained model the local set shares


class Lab:
  """Knows the paths of one scale, and collects the stages that lead to them.

  A method named after a result adds the stages that it needs, once each, and returns
  its path.
  """

  def __init__(self, scale: Scale, output_dir: str, tfds_data_dir: str | None = None):
    """Collects nothing yet.

    Args:
      scale: which models and data.
      output_dir: folder of all results, local or gs://; the scale's is below it.
      tfds_data_dir: of TensorFlow Datasets, where it is not the default.
    """
    self.scale, self.output_dir = scale, epath.Path(output_dir)
    self._flags, self._data_dir = list(scale.flags), tfds_data_dir
    if tfds_data_dir:
      self._flags.append(f'--tfds_data_dir={tfds_data_dir}')
    self.folder = self.output_dir / scale.name
    self._stages: dict[Any, Stage] = {}
    # Checkpoints that a run leaves on its way -> the result of its stage.
    self._made_by: dict[Any, Any] = {}

  @property
  def stages(self) -> list[Stage]:
    """The stages so far, in an order that can be run."""
    return list(self._stages.values())

  def add(self, *stages: Stage) -> Any:
    """Adds stages unless they are there; returns the result of the last."""
    for stage in stages:
      self._stages.setdefault(stage.result, stage)
    return stages[-1].result

  @property
  def data_flags(self) -> list[str]:
    """The folder of TensorFlow Datasets, as a flag of gqa_t5x.data's commands."""
    return [f'--data_dir={self._data_dir}'] if self._data_dir else []

  def stage(self, result: Any) -> Stage:
    """Returns the stage that makes a result."""
    return self._stages[result]

  # --- Numbers ------------------------------------------------------------------

  def value(self, kind: str, name: str, task: str = '') -> Any:
    """Returns a macro's value as a kind of run has it."""
    if name in self.scale.macros[kind]:
      return self.scale.macros[kind][name]
    for file in reversed(self.scale.gin_files[kind]):
      if '{size}' in file:
        continue
      try:
        return macro(file.format(task=task), name)
      except ValueError:
        continue
    raise ValueError(f'no gin file of {kind} sets {name}.')

  @property
  def pretrain_steps(self) -> int:
    """Steps of pre-training."""
    return self.value('pretrain', 'TRAIN_STEPS')

  def step(self, alpha: float) -> int:
    """The step of a checkpoint that is uptrained so far."""
    return self.pretrain_steps + round(alpha * self.pretrain_steps)

  # --- Checkpoints --------------------------------------------------------------

  def pretrained(self, size: str) -> Any:
    """The MHA model that all others come from."""
    if self.scale.public:
      return epath.Path(self.scale.public.format(size=size))
    return self.add(conversion.pretrain_stage(conversion.Paths(self.output_dir, STUDY)))

  def from_scratch(self, model: Model) -> Any:
    """A model that has few heads from the first step."""
    steps = self.pretrain_steps
    result = self.folder / 'pretrained' / model.name / f'checkpoint_{steps}'
    macros = self._heads(model) | {'MODEL_DIR': result.parent}
    return self.add(
      self._training(
        f'pre-train {model.label} from scratch, {steps:,} steps',
        'pretrain',
        model,
        result,
        macros,
        steps=steps,
      )
    )

  def converted(self, model: Model) -> Any:
    """A model right after conversion."""
    source = self.pretrained(model.size)
    result = self.folder / 'converted' / model.origin / source.name
    statistics = self.statistics(model.size) if model.method == 'svd' else None
    return self.add(
      Stage(
        f'convert to {model.label} by {model.method}',
        result,
        commands.convert(
          source, result, model.num_kv_heads, method=model.method, statistics=statistics
        ),
        needs=tuple(filter(None, (*self._made(source), statistics))),
        reads=self._public(source),
      )
    )

  def statistics(self, size: str) -> Any:
    """The statistics of a pre-trained model's inputs, for conversion."""
    source = self.pretrained(size)
    result = self.folder / 'converted' / f'{size}.statistics.npz'
    files = self._files('calibrate', size)
    macros = {'CHECKPOINT_PATH': source, 'OUTPUT': result}
    return self.add(
      Stage(
        f'collect statistics of MHA-{size}',
        result,
        commands.engine('gqa_t5x.calibrate', files, self._flags, **macros),
        needs=self._made(source),
        reads=(*self._public(source), self.value('pretrain', 'MIXTURE_OR_TASK_NAME')),
      )
    )

  def uptrained(self, model: Model) -> Any:
    """A model after uptraining.

    T5's schedule does not depend on the last step, so a run passes every smaller alpha
    on its way, and a longer run goes on where a shorter one has ended.
    """
    source, last = self.converted(model), self.step(model.alpha)
    folder = self.folder / 'uptrained' / model.origin
    result = folder / f'checkpoint_{last}'
    runs = sorted((p for p in self._stages if p.parent == folder), key=step_of)
    longer = [path for path in runs if step_of(path) >= last]
    if not model.alpha:
      return source
    if longer:
      self._made_by[result] = longer[0]
      return result
    start = step_of(runs[-1]) if runs else self.pretrain_steps
    macros = self._heads(model) | {
      'MODEL_DIR': folder,
      'INITIAL_CHECKPOINT_PATH': source,
      'TRAIN_STEPS': last,
    }
    return self.add(
      self._training(
        f'uptrain {model.label} by {model.method} to alpha = {model.alpha:g}',
        'uptrain',
        model,
        result,
        macros,
        needs=(source, *runs),
        steps=last - start,
      )
    )

  def checkpoint(self, model: Model) -> Any:
    """What a model is fine-tuned from."""
    if model.method == PRETRAINED:
      return self.pretrained(model.size)
    return (
      self.from_scratch(model) if model.method == SCRATCH else self.uptrained(model)
    )

  # --- Scores and times ---------------------------------------------------------

  def model_dir(self, model: Model, task: str, seed: int) -> Any:
    """Where a model is fine-tuned: with its scores, whether run or not."""
    return self.folder / 'finetuned' / model.name / task / f'seed{seed}'

  def finetuned(self, model: Model, task: str, seed: int) -> Any:
    """A model fine-tuned on a task, evaluated on the way."""
    source = self.checkpoint(model)
    steps = self.value('finetune', 'FINETUNE_STEPS', task)
    folder = self.model_dir(model, task, seed)
    result = folder / f'checkpoint_{step_of(source) + steps}'
    macros = self._heads(model) | {
      'MODEL_DIR': folder,
      'INITIAL_CHECKPOINT_PATH': source,
      'RANDOM_SEED': seed,
    }
    return self.add(
      self._training(
        f'fine-tune {model.label} on {task}, seed {seed}',
        'finetune',
        model,
        result,
        macros,
        task=task,
        needs=self._made(source),
        reads=self._public(source),
        steps=steps,
      )
    )

  def translated(self, size: str) -> Any:
    """Shazeer's model, trained on WMT14 and scored with one beam and with four."""
    last = macro('gin/runs/translate.gin', 'TRAIN_STEPS')
    folder = self.folder / 'translated' / size
    vocabulary = self.folder / 'translated' / 'vocabulary.model'
    self.add(
      Stage(
        'train the vocabulary of WMT14',
        vocabulary,
        (
          '-m',
          'gqa_t5x.data.wmt_vocabulary',
          f'--output={vocabulary}',
          *self.data_flags,
        ),
        reads=('wmt14_en_de_shazeer',),
      )
    )
    common = {'VOCABULARY_FILE': vocabulary}
    files = [f'gin/models/{size}.gin', TRANSLATE_TASK, 'gin/runs/translate.gin']
    trained = self.add(
      Stage(
        f'train {size} on WMT14, {last:,} steps',
        folder / f'checkpoint_{last}',
        commands.engine('t5x.train', files, self._flags, MODEL_DIR=folder, **common),
        needs=(vocabulary,),
        reads=('wmt14_en_de_shazeer',),
        work=last,
      )
    )
    for beams, name in ((1, 'greedy'), (4, 'beam_search')):
      files = [f'gin/models/{size}.gin', TRANSLATE_TASK, 'gin/runs/eval.gin']
      files += [f'gin/decoding/{name}.gin'] if beams > 1 else []
      scores = self.translation_scores(size, beams)
      self.add(
        Stage(
          f'translate the test set by {size}, {beams} beam{"s" * (beams > 1)}',
          scores,
          commands.engine(
            't5x.eval',
            files,
            self._flags,
            CHECKPOINT_PATH=trained,
            SPLIT='test',
            EVAL_OUTPUT_DIR=scores.parent.parent,
            **common,
          ),
          needs=(vocabulary, trained),
          reads=('wmt14_en_de_shazeer',),
        )
      )
    return trained

  def translation_scores(self, size: str, beams: int) -> Any:
    """Where seqio writes the scores of the test set."""
    folder = self.folder / 'translated' / f'{size}_test_beam{beams}'
    return folder / 'inference_eval' / 'wmt14_en_de_shazeer-metrics.jsonl'

  def timed(self, name: str, timing: Timing) -> Any:
    """Rows of `gqa_t5x.benchmark decode`."""
    result = self.rows(name)
    words = (f'--{flag}={value}' for flag, value in timing.flags().items())
    return self.add(
      Stage(
        f'time {name}',
        result,
        ('-m', 'gqa_t5x.benchmark', 'decode', *words, f'--json={result}'),
        alone=True,
      )
    )

  def rows(self, name: str) -> Any:
    """Where rows of a benchmark are."""
    return self.folder / 'benchmark' / f'{name}.json'

  # --- Inside -------------------------------------------------------------------

  def _training(
    self,
    title: str,
    kind: str,
    model: Model,
    result: Any,
    macros: dict[str, Any],
    *,
    steps: int,
    task: str = '',
    needs: tuple[Any, ...] = (),
    reads: tuple[str, ...] = (),
  ) -> Stage:
    """A stage that trains; `macros` are added to those of the kind and the size."""
    size_macros = self.scale.size_macros.get(model.size, {})
    macros = {**self.scale.macros[kind], **size_macros, **macros}
    local = self.scale.public is None
    return Stage(
      title,
      result,
      commands.engine(
        't5x.train', self._files(kind, model.size, task), self._flags, **macros
      ),
      needs=tuple(needs),
      reads=(*reads, task or self.value(kind, 'MIXTURE_OR_TASK_NAME')),
      # Short runs begin anew: their evaluations would stand twice.
      leftover=result.parent if local and kind != 'pretrain' else None,
      work=steps,
      hours=self._hours(kind, model, steps, task),
      macros=macros,
    )

  def _hours(self, kind: str, model: Model, steps: int, task: str) -> float:
    lengths = self.value(kind, 'TASK_FEATURE_LENGTHS', task)
    inputs, targets = lengths['inputs'], lengths['targets']
    batch_size = self.value(kind, 'BATCH_SIZE', task)
    shape, lengths = (model.size, model.num_kv_heads), (batch_size, inputs, targets)
    chip = self.scale.chip
    hours = estimates.training_hours(*shape, *lengths, steps, chip)
    if task:
      evaluations = steps // self.value(kind, 'EVAL_PERIOD', task)
      examples = evaluations * self.scale.dev_examples[task]
      hours += estimates.decoding_hours(*shape, examples, *lengths, chip)
    return hours

  def _files(self, kind: str, size: str, task: str = '') -> list[str]:
    files = (*self.scale.gin_files[kind], *self.scale.size_files.get(size, ()))
    return [file.format(size=size, task=task) for file in files]

  def _heads(self, model: Model) -> dict[str, int]:
    return {} if model.num_kv_heads is None else {'NUM_KV_HEADS': model.num_kv_heads}

  def _made(self, source: Any) -> tuple[Any, ...]:
    """The result to wait for before `source` is there; none if it is public."""
    maker = self._made_by.get(source, source)
    return (maker,) if maker in self._stages else ()

  def _public(self, source: Any) -> tuple[str, ...]:
    return () if self._made(source) else (str(source),)


def step_of(checkpoint: Any) -> int:
  """Returns the step of a checkpoint, which its name ends in."""
  return int(checkpoint.name.removeprefix('checkpoint_'))


def num_kv_heads(model: Model) -> int:
  """Returns K as a number, that of MHA, too."""
  return model.num_kv_heads or sizes.SIZES[model.size]['num_heads']
