"""CTranslate2's decoder of the same model, to be timed beside ours."""

import contextlib
import functools
import io
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from gqa_t5x.analysis.benchmarks import timing
from gqa_t5x.checkpoints import tree
from gqa_t5x.checkpoints.config import ModelConfig
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
from gqa_t5x.exports import run
from gqa_t5x.exports.source import Source


def decoder(
  quantization: str,
  cfg: Any,
  params: Any,
  inputs_BS: jax.Array,
  length: int,
  num_beams: int,
) -> tuple[Callable[[], Any], Callable[[int, int], float]]:
  """Returns what is measured, as `decode_benchmark.decoder` does for our network.

  CTranslate2 gets as many threads as this process has cores. It encodes in every call,
  which takes far longer than a step; so greedy steps are timed inside of one call, by
  when their tokens come.
  """
  del cfg, length
  import ctranslate2

  tensors = {n: LazyTensor.of(np.asarray(x)) for n, x in tree.flatten(params)}
  architecture = tree.read_architecture({n: x.shape for n, x in tensors.items()})
  source = Source(None, tensors, architecture, ModelConfig(), 0)
  with tempfile.TemporaryDirectory() as folder:
    with contextlib.redirect_stdout(io.StringIO()):
      path = epath.Path(folder) / 'model'
      run.write(source, path, 'ctranslate2', quantization=quantization)
    threads = len(os.sched_getaffinity(0))
    translator = ctranslate2.Translator(str(path), intra_threads=threads)
  rows = [[str(token) for token in row] for row in np.asarray(inputs_BS)]

  def decode(steps: int, **options) -> None:
    translator.translate_batch(
      rows,
      beam_size=num_beams,
      max_input_length=0,  # Or it would cut at 1024.
      min_decoding_length=steps,
      max_decoding_length=steps,
      **options,
    )

  def step_seconds(few: int, many: int) -> float:
    times = {}  # step, from 0 -> when its first token came

    def note(token):
      times.setdefault(token.step, time.perf_counter())
      return False  # Go on.

    decode(many, callback=note)
    return (times[many - 1] - times[few - 1]) / (many - few)

  slope = functools.partial(timing.slope, decode)
  return functools.partial(decode, 1), step_seconds if num_beams == 1 else slope
