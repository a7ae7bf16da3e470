"""What the tests of plans look at in stages."""

import ast

import gin
from gqa_t5x.model import sizes
from gqa_t5x.reproduce.experiments.models import (
  Model,
)
from helpers import gin_cases

BUCKET = 'gs://bucket'


def kinds(chosen) -> dict[str, int]:
  names = [stage.command[1] for stage in chosen]
  return {name: names.count(name) for name in dict.fromkeys(names)}


def gin_arguments(stage):
  """The gin files and macros of a command of the engine."""
  pairs = [w.partition('=') for w in stage.command if w.startswith('--gin.')]
  macros = {n.removeprefix('--gin.'): ast.literal_eval(v) for n, _, v in pairs}
  files = [w.partition('=')[2] for w in stage.command if w.startswith('--gin_file=')]
  return files, macros


def check_training(stage, model: Model, **expected):
  """Parses a training command; returns what the engine's `train` is given."""
  files, bindings = gin_arguments(stage)
  with gin_cases.parsed(files, bindings) as arguments_of:
    found = arguments_of('train')
    config = found['model'].module.config
    macros = {name: gin.query_parameter(f'{name}/macro.value') for name in expected}
  size = sizes.SIZES[model.size]
  assert (config.emb_dim, config.num_heads) == (size['emb_dim'], size['num_heads'])
  assert config.encoder_kv == size['num_heads']
  assert config.self_kv == config.cross_kv == model.num_kv_heads
  assert config.kv_head_dim == model.kv_head_dim
  assert macros == expected
  assert stage.result.name == f'checkpoint_{found["total_steps"]}'
  assert str(stage.result.parent) == found['model_dir']
  return found
