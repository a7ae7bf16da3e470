"""Trains a tiny model on whichever T5X is on the path; a process for test_t5x_parity.

  python tests/helpers/t5x_parity_worker.py JOBS.json

Each job names a model_dir, total_steps, and optionally: restore (the path of a
checkpoint), legacy (whether T5X's old layout is written), num_microbatches. The losses
of all steps and the sums of the final parameters are printed as JSON on the last line.
"""

import json
import sys

import numpy as np
from t5x import adafactor, models, partitioning, trainer, utils
from t5x import train as train_lib

from gqa_t5x.model import network
from helpers import tiny_task


def _model():
  layers = dict(num_encoder_layers=1, num_decoder_layers=2)
  config = network.config(
    'tiny', vocab_size=384, num_kv_heads=2, dropout_rate=0.1, **layers
  )
  vocabulary = tiny_task.vocabulary()
  return models.EncoderDecoderModel(
    network.Transformer(config),
    vocabulary,
    vocabulary,
    adafactor.Adafactor(decay_rate=0.8, step_offset=0),
    z_loss=1e-4,
    label_smoothing=0.1,
    loss_normalizing_factor=100.0,
  )


class _Recorder(trainer.Trainer):
  """Keeps the loss of every step."""

  losses: list  # set by each job

  def train(self, batch_iter, num_steps, start_step=None):
    future = super().train(batch_iter, num_steps, start_step)
    summary = future.result()
    self.losses.append({k: float(summary[k].value) for k in ('loss', 'accuracy')})
    return future


def _dataset(split):
  return utils.DatasetConfig(
    mixture_or_task_name=tiny_task.NAME,
    task_feature_lengths={'inputs': 48, 'targets': 48},
    split=split,
    batch_size=8,
    shuffle=split == 'train',
    seed=5,
    pack=True,
  )


def run(job):
  """Runs one job; returns its losses and a digest of its parameters."""
  _Recorder.losses = []
  schedule = utils.create_learning_rate_scheduler(
    'constant * rsqrt_decay', base_learning_rate=1.0, warmup_steps=100
  )

  def make_trainer(**kwargs):
    return _Recorder(
      learning_rate_fn=schedule,
      num_microbatches=job.get('num_microbatches'),
      **kwargs,
    )

  restore = None
  if job.get('restore'):
    restore = utils.RestoreCheckpointConfig(path=job['restore'], mode='specific')
  save = utils.SaveCheckpointConfig(
    period=job['total_steps'], save_dataset=not job.get('legacy')
  )
  _, state = train_lib.train(
    model=_model(),
    train_dataset_cfg=_dataset('train'),
    train_eval_dataset_cfg=_dataset('validation'),
    infer_eval_dataset_cfg=None,
    checkpoint_cfg=utils.CheckpointConfig(save=save, restore=restore),
    partitioner=partitioning.PjitPartitioner(num_partitions=1),
    trainer_cls=make_trainer,
    model_dir=job['model_dir'],
    total_steps=job['total_steps'],
    eval_steps=2,
    eval_period=job['total_steps'],
    stats_period=1,
    random_seed=3,
    summarize_config_fn=lambda *_: None,
    **({'use_orbax': False} if job.get('legacy') else {}),
  )
  flat = utils.flatten_dict_string_keys(state.params)
  digest = {k: float(np.abs(np.asarray(v)).sum()) for k, v in flat.items()}
  return {'losses': _Recorder.losses, 'params': digest}


if __name__ == '__main__':
  with open(sys.argv[1]) as jobs_file:
    jobs = json.load(jobs_file)
  print('\n' + json.dumps([run(job) for job in jobs]))
