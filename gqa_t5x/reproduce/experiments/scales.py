"""The two scales of the papers' experiments: their own, and one for this machine.

A scale is data: which models and tasks, which gin files and values. What is done with
them is the same at both (planner.py, targets.py).
"""

import dataclasses
from collections.abc import Mapping

from gqa_t5x.reproduce.experiments import paper
from gqa_t5x.reproduce.experiments.commands import QUIET
from gqa_t5x.reproduce.experiments.experiment import Experiment, Names, Timing
from gqa_t5x.reproduce.experiments.models import (
  MEAN,
  PAPER_METHODS,
  SCRATCH,
  SVD,
  Method,
  Model,
  mha,
)
from gqa_t5x.reproduce.experiments.studies import QUICK

# Models of a public T5.1.1 are pre-trained so long.
PUBLIC = 'gs://t5-data/pretrained_models/t5x/t5_1_1_{model.size}/checkpoint_1000000'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale(Experiment):
  """One scale: an experiment with fine-tuning and times.

  `models` are those of table 1 and figure 3.

  Attributes:
    tasks: seqio tasks that they are fine-tuned on -> examples of the validation split,
      for estimates alone.
    unstable: models whose runs of fine-tuning differ: three seeds instead of one.
    ablation: of figure 4: what is converted to MQA, by which methods.
    ablation_tasks: of figures 4 and 5, and of appendix A.
    alphas: of figure 5, and the models that it follows.
    scratch: of appendix A: pre-trained with few heads, and what it is held to.
    timings: how the decoding of each size is timed for table 1.
    heads: of figure 6.
    latent: the latent form beside it.
    shazeer: how Shazeer's models are timed; their size is left open.
  """

  tasks: Mapping[str, int]
  unstable: tuple[Model, ...]
  ablation: tuple[Model, ...]
  ablation_tasks: tuple[str, ...]
  alphas: Mapping[Model, tuple[float, ...]]
  scratch: tuple[Model, ...]
  timings: tuple[Timing, ...]
  heads: Timing
  latent: Timing
  shazeer: Timing

  def seeds_of(self, model: Model) -> tuple[int, ...]:
    """Seeds of fine-tuning a model."""
    return (1, 2, 3) if model in self.unstable else (1,)


def _paper_timings(
  size: str, num_kv_heads: tuple[int, ...], kv_head_dim: int | None = None
) -> tuple[Timing, ...]:
  """One for each pair of lengths among the tasks of table 1."""
  more = {'kv_head_dim': kv_head_dim}
  return tuple(
    Timing(size, num_kv_heads, 'fill', inputs, outputs, 'bfloat16', **more)
    for inputs, outputs in paper.LENGTHS
  )


def _uptrained(size: str, num_kv_heads: int, method: Method = MEAN) -> Model:
  return Model(size, num_kv_heads, method, paper.ALPHA)


# Not in the paper: the cache of GQA-8, in one head that all query heads read.
LATENT = Model('xxl', 1, SVD, kv_head_dim=512)


def _names(pretrained: str) -> Names:
  return Names(
    pretrained=pretrained,
    statistics='converted/{model.size}.statistics.npz',
    converted='converted/{model.origin}/checkpoint_{step}',
    uptrained='uptrained/{model.origin}/checkpoint_{step}',
    statistics_title='collect statistics of MHA-{model.size}',
    convert_title='convert to {model.label} by {model.method.name}',
    uptrain_title=(
      'uptrain {model.label} by {model.method.name} to alpha = {model.alpha:g}'
    ),
  )


GIVEN = ('NUM_KV_HEADS', 'KV_HEAD_DIM', 'MODEL_DIR', 'INITIAL_CHECKPOINT_PATH')
GIVEN += ('TRAIN_STEPS',)
APPENDIX_A = (
  Model('large', 1, SCRATCH),
  _uptrained('large', 1),
  _uptrained('large', 8),
)
PAPER = Scale(
  name='paper',
  folder='paper',
  public=True,
  names=_names(PUBLIC),
  given=GIVEN,
  models=(
    mha('large'),
    mha('xxl'),
    _uptrained('xxl', 1),
    _uptrained('xxl', 8),
    dataclasses.replace(LATENT, alpha=paper.ALPHA),
  ),
  # TensorFlow Datasets' catalog; MediaSum: its own split file.
  tasks={
    'cnn_dailymail': 13_368,
    'arxiv': 6_436,
    'pubmed': 6_633,
    'mediasum': 10_000,
    'multi_news': 5_622,
    'wmt14_en_de': 3_000,
    'trivia_qa': 7_993,
  },
  # The paper reports the mean of three runs where runs differ.
  unstable=(_uptrained('xxl', 1), *APPENDIX_A),
  ablation=tuple(_uptrained('large', 1, method) for method in (*PAPER_METHODS, SVD)),
  ablation_tasks=paper.ABLATION_TASKS,
  alphas={
    mha('xxl'): (0.0,),
    Model('xxl', 1, MEAN): paper.ALPHAS,
    Model('xxl', 8, MEAN): paper.ALPHAS,
    LATENT: paper.ALPHAS,
  },
  scratch=APPENDIX_A,
  gin_files={
    kind: (
      'gin/models/t5_1_1_{model.size}.gin',
      f'gin/tasks/{task}.gin',
      f'gin/runs/{kind}.gin',
    )
    for kind, task in {
      'pretrain': 'c4_span_corruption',
      'calibrate': 'c4_span_corruption',
      'uptrain': 'c4_span_corruption',
      'finetune': '{task}',
    }.items()
  },
  macros={'uptrain': {'CHECKPOINT_PERIOD': 5_000}},
  size_files={'xxl': ('gin/partitioning/2d.gin',)},
  size_macros={
    'xxl': {'MODEL_PARTITIONS': 8, 'NUM_MICROBATCHES': 4, 'REMAT_POLICY': 'full'}
  },
  timings=(
    *_paper_timings('large', (16,)),
    *_paper_timings('xxl', (64, 8, 1)),
    *_paper_timings('xxl', (1,), LATENT.kv_head_dim),
  ),
  heads=Timing('xxl', paper.FIGURE6_HEADS[::-1], 'fill', 2048, 512, 'bfloat16'),
  latent=Timing('xxl', (1,), 'fill', 2048, 512, 'bfloat16', kv_head_dim=512),
  shazeer=Timing('', (), 1024, 128, 128, 'bfloat16', (1, 4)),
  chip='v4',
)
LOCAL = Scale(
  name='local',
  folder='local',
  names=_names('conversion/quick/mha/checkpoint_{step}'),  # the study's
  given=GIVEN,
  models=(mha('tiny'), _uptrained('tiny', 1), _uptrained('tiny', 2)),
  tasks={'pydocs_summarize': 977},
  unstable=(_uptrained('tiny', 1),),
  ablation=(),  # figures 4 and 5 are rows of the study of conversion
  ablation_tasks=('pydocs_summarize',),
  alphas={},
  scratch=(Model('tiny', 1, SCRATCH),),
  gin_files={
    'pretrain': QUICK.gin_files['pretrain'],
    'uptrain': QUICK.gin_files['uptrain'],
    'finetune': ('gin/local/finetune.gin',),
  },
  macros={'uptrain': {'CHECKPOINT_PERIOD': 60, 'EVAL_PERIOD': 60}},
  flags=(QUIET,),
  begin_anew=('uptrain', 'finetune'),
  timings=(Timing('tiny', (8, 2, 1), 32, 512, 32, 'float32'),),
  heads=Timing('base', (12, 6, 4, 3, 2, 1), 4, 512, 64, 'float32', repeats=5),
  latent=Timing('base', (1,), 4, 512, 64, 'float32', repeats=5, kv_head_dim=256),
  shazeer=Timing('', (), 8, 128, 32, 'float32', (1, 4), repeats=5),
  chip='core',
)
SCALES = {scale.name: scale for scale in (PAPER, LOCAL)}
