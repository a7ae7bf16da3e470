"""What an experiment is: which models, how they are trained, where results are."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gqa_t5x.reproduce.experiments.models import Model

Macros = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Names:
  """Paths below an experiment's folder, and titles of stages.

  All are formats of {model}; paths of checkpoints also of {step}.
  """

  pretrained: str
  statistics: str
  converted: str
  uptrained: str
  statistics_title: str = 'collect statistics'
  convert_title: str = (
    'convert to {model.num_kv_heads} K/V heads by {model.method.title}'
  )
  uptrain_title: str = (
    'uptrain with {model.num_kv_heads} K/V heads, {model.method.title}'
  )


@dataclasses.dataclass(frozen=True)
class Conclusion:
  """The last two stages of an experiment that compares its own models.

  Attributes:
    experiment: its name for the verbs `evaluate` and `report`.
    flags: that the verbs take besides --output_dir.
    evaluate_title: of the stage that writes `rows.json`.
    report: the file that the last stage writes.
    report_title: of that stage.
  """

  experiment: str
  flags: Mapping[str, str]
  evaluate_title: str
  report: str
  report_title: str


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Models, and how they are made.

  Attributes:
    name: in commands.
    folder: of its results, below the folder of all.
    models: that it is about.
    names: of results and stages.
    gin_files: kind of run (pretrain, calibrate, uptrain, finetune) -> gin files, with
      {model} and {task}.
    macros: kind of run -> values for them.
    given: macros of an uptraining run that its command gives, in order.
    size_files: size -> further gin files of every training run.
    size_macros: size -> values for every training run.
    flags: of every run.
    public: whether the pre-trained checkpoints are given, not made by us.
    begin_anew: kinds of runs that are too short to go on from a checkpoint: their
      evaluations would stand twice.
    chip: that estimates are for, a key of chips.CHIPS; None: a plan tells neither
      hours nor data sets.
    conclusion: the last two stages, of experiments that have them.
  """

  name: str
  folder: str
  models: tuple[Model, ...]
  names: Names
  gin_files: Mapping[str, tuple[str, ...]]
  macros: Mapping[str, Macros]
  given: tuple[str, ...]
  size_files: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  size_macros: Mapping[str, Macros] = dataclasses.field(default_factory=dict)
  flags: tuple[str, ...] = ()
  public: bool = False
  begin_anew: tuple[str, ...] = ()
  chip: str | None = None
  conclusion: Conclusion | None = None


@dataclasses.dataclass(frozen=True)
class Timing:
  """What `gqa_t5x.benchmark decode` is asked for, as its flags."""

  size: str
  num_kv_heads: tuple[int, ...]
  batch_size: int | str
  input_length: int
  output_length: int
  dtype: str
  num_beams: tuple[int, ...] = (1,)
  repeats: int = 7
  kv_head_dim: int | None = None

  def flags(self) -> dict[str, str]:
    """The command's flags; what is left open is the size's own."""
    values = dataclasses.asdict(self)
    return {
      name: ','.join(map(str, value)) if isinstance(value, tuple) else str(value)
      for name, value in values.items()
      if value not in ((), None)
    }
