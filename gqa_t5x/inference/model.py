"""A T5 in memory: loaded from any format, converted, decoded, scored, saved.

  model = gqa_t5x.load('flan-t5-base')
  fast = model.convert(num_kv_heads=4, texts=texts)
  fast.generate(['translate English to German: How are you?'])

Letters: B batch, S input length, T target length, n beams or samples of an input.
"""

import dataclasses
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from gqa_t5x.checkpoints import config as config_file
from gqa_t5x.checkpoints import tree
from gqa_t5x.checkpoints.lazy_tensor import LazyTensor
from gqa_t5x.conversion import (
  input_statistics,
  input_sums,
  module_arrays,
  output_refit,
  plan,
)
from gqa_t5x.errors import BadInput
from gqa_t5x.exports import run
from gqa_t5x.inference import examples, int8, programs, recipes, saved, tokenizer
from gqa_t5x.inference.layout import Layout, OneDevice
from gqa_t5x.inference.texts import Text, Texts, shaped
from gqa_t5x.model import network, quantize, sizes

_PROGRESS_FROM = 64  # inputs: below, no progress is shown


class Model:
  """A T5 with its parameters on the devices; `load` makes it.

  Attributes:
    config: a `network.T5Config`.
    params: nested dict of arrays, under T5X's names.
    tokenizer: of `gqa_t5x.inference.tokenizer`, or None.
  """

  def __init__(
    self,
    config: network.T5Config,
    params: Any,
    model_config: config_file.ModelConfig,
    tokenizer: tokenizer.Tokenizer | None,
    *,
    tokenizer_path: epath.Path | None = None,
    step: int = 0,
    model_partitions: int | None = None,
  ):
    self.config, self.tokenizer = config, tokenizer
    self._model_config, self._tokenizer_path = model_config, tokenizer_path
    self._step, self._model_partitions = step, model_partitions
    self._texts = Texts(tokenizer, config.vocab_size, model_config.eos_token_id)
    self._module = network.Transformer(config)
    one = model_partitions is None
    layout = OneDevice() if one else Layout(config, model_partitions)
    self.params, self._run = layout.put_params(params), layout.run

  def __repr__(self) -> str:
    c = self.config
    rounded = f'; int8 {c.quantize.replace("_", " ")}' if c.quantize else ''
    return (
      f'<T5 of {self.num_parameters:,} parameters: {c.num_encoder_layers} +'
      f' {c.num_decoder_layers} layers, width {c.emb_dim}, {c.num_heads} heads;'
      f' key/value heads of {c.kv_size}: self-attention {c.self_kv}, cross-attention'
      f' {c.cross_kv}{rounded}>'
    )

  @property
  def num_parameters(self) -> int:
    """Elements of all parameters; scales of int8 do not count."""
    flat = tree.flatten(self.params)
    return sum(x.size for name, x in flat if not name.endswith(quantize.SCALE))

  # --- Fewer bits, fewer heads ---------------------------------------------------

  def quantize(self, what: str = quantize.BOTH) -> 'Model':
    """Returns a model that computes with int8, for decoding and scoring.

    Args:
      what: 'weights' (kernels, a scale for each column), 'cache' (keys and values of
        the decoder, a scale for each position and head) or 'weights_and_cache'.

    Raises:
      BadInput: `what` is unknown, or would need weights in float that are int8.
    """
    return self._changed(*int8.quantized(self.config, self.params, what))

  def convert(
    self,
    num_kv_heads: int | None = None,
    method: str = 'svd',
    texts: Sequence[Any] | None = None,
    *,
    kv_head_dim: int | None = None,
    refit_outputs: bool = False,
    batch_size: int = 8,
    **recipe: Any,
  ) -> 'Model':
    """Returns a model with fewer key/value heads in decoder self- and cross-attention.

    Args:
      num_kv_heads: 1 is MQA; it must divide the heads that there are.
      method: of `python -m gqa_t5x.convert --help`: 'mean' is the paper's, 'svd' loses
        least.
      texts: some hundred that are like those the model will see, for methods that use
        statistics ('svd'): pairs (input, target), or texts alone, of which T5's
        span corruption makes pairs. None: the weights alone decide, which costs more.
      kv_head_dim: size of the new heads; another than the head size is the latent form,
        which 'svd' alone makes.
      refit_outputs: move the output kernels to where modules come closest to the
        original's outputs on the texts, after the conversion by any method.
      batch_size: of the texts that are run through the model together.
      **recipe: `grouping`, `seed`, `self_attention_num_kv_heads`,
        `cross_attention_num_kv_heads`, `encoder_num_kv_heads`; and `statistics`, a file
        of `calibrate` in the place of texts.

    Raises:
      BadInput: unknown method, heads that do not divide or of a size that cannot be,
        texts for a method that uses none, or too few to refit outputs.
    """
    int8.check_float(self.params, 'convert')
    recipe |= {'num_kv_heads': num_kv_heads, 'kv_head_dim': kv_head_dim}
    recipe['method'] = method
    recipes.check(recipe, texts, refit_outputs)
    with tempfile.TemporaryDirectory() as folder:
      if texts is not None and recipes.uses_statistics(recipe):
        recipe['statistics'] = os.path.join(folder, 'statistics.npz')
        encoder = recipe.get('encoder_num_kv_heads') is not None
        self.calibrate(texts, recipe['statistics'], batch_size, encoder)
      model = self._converted(recipe)
      if refit_outputs:
        sums = os.path.join(folder, 'sums.npz')
        model._collect_outputs(self, texts, sums, batch_size)
        model = model._converted({'refit_outputs': sums})
    return model

  def _converted(self, recipe: dict[str, Any]) -> 'Model':
    """The model that `plan.convert_params` makes by the fields of a `plan.Recipe`."""
    params = plan.convert_params(jax.tree.map(np.asarray, self.params), **recipe)
    dtype = self.config.dtype
    params = jax.tree.map(lambda x: np.asarray(x).astype(dtype), params)
    shapes = {name: x.shape for name, x in tree.flatten(params)}
    fields = sizes.from_checkpoint(tree.read_architecture(shapes), self._model_config)
    return self._changed(dataclasses.replace(self.config, **fields), params)

  def calibrate(
    self,
    texts: Sequence[Any],
    path: epath.PathLike,
    batch_size: int = 8,
    include_encoder: bool = False,
  ) -> None:
    """Runs texts through the model, and writes what its attention modules read.

    The file is that of `python -m gqa_t5x.calibrate`; it serves every number of heads.
    """
    int8.check_float(self.params, 'calibrate')
    function = (programs.sum_inputs, self._module, include_encoder, self.params)
    totals, info = self._add_up(texts, batch_size, *function)
    statistics = input_sums.mean_statistics(totals)
    info['kernels'] = self._samples(statistics)
    input_statistics.write_statistics(path, statistics, info)

  def _collect_outputs(
    self, original: 'Model', texts: Sequence[Any], path: str, batch_size: int
  ) -> None:
    """Runs texts through the original model, and writes what refits this one to it."""
    function = (programs.sum_outputs, original._module, self.config)
    params = (original.params, self.params)
    totals, info = original._add_up(texts, batch_size, *function, *params)
    sums = input_sums.means(totals)
    info['kernels'] = self._samples(sums)
    output_refit.write_sums(path, sums, info)

  def _add_up(
    self, texts: Sequence[Any], batch_size: int, *function: Any
  ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Adds up what a compiled program, and what it takes first, returns for texts."""

    def sums(*arrays):
      return self._run(*function, *arrays, self._start)

    return examples.add_up(self.examples(texts), batch_size, sums)

  def _samples(self, modules: Iterable[str]) -> dict[str, Any]:
    params = {name: LazyTensor.of(x) for name, x in tree.flatten(self.params)}
    return module_arrays.samples(params, modules)

  # --- Text to text -------------------------------------------------------------

  def generate(
    self,
    inputs: Sequence[Text],
    *,
    max_length: int = 128,
    num_beams: int = 1,
    alpha: float = 0.6,
    temperature: float = 0.0,
    topk: int = 0,
    topp: float = 0.0,
    num_decodes: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    max_input_length: int | None = None,
    return_scores: bool = False,
    progress: bool | None = None,
  ) -> Any:
    """Decodes a text, or several, for each input: greedily by default.

    Inputs are decoded together by length; each power of two is compiled once.

    Args:
      inputs: texts, to which the end marker is added, or lists of ids as they are.
      max_length: most tokens of a result, the end marker included.
      num_beams: above 1, beam search.
      alpha: of beam search; scores are divided by ((5 + length) / 6)^alpha.
      temperature: above 0, sampling; divides the logits.
      topk, topp: of sampling: draw from so many of the likeliest tokens, or from those
        that together have this probability; 0: from all.
      num_decodes: results of each input: samples, or the best beams.
      seed: of sampling.
      batch_size: inputs that are decoded together.
      max_input_length: longer inputs are cut to so many tokens; None: none is.
      return_scores: return scores, too.
      progress: show it; None: from 64 inputs on, in a terminal.

    Returns:
      A list with a text for each input (a list of ids without a tokenizer), or with
      num_decodes > 1 a list of them, best first. With return_scores, (that, the
      log-probabilities: the sampled distribution's, or by beam search as of `alpha`).

    Raises:
      BadInput: options that contradict each other, or text without a tokenizer.
    """
    if isinstance(inputs, str) or not isinstance(inputs, Iterable):
      raise BadInput('inputs is not a list of texts; give one: generate([text])')
    way = programs.Way(num_beams, alpha, temperature, topk, topp, num_decodes)
    way.check(max_length, batch_size, max_input_length)
    ids = [self._texts.ids(text, max_input_length) for text in inputs]
    results: list[Any] = [None] * len(ids)
    decoded = self._decode(ids, way, max_length, seed, batch_size)
    auto = progress is None and len(ids) >= _PROGRESS_FROM
    hide = None if auto else not progress
    with tqdm(total=len(ids), desc='Decoding', unit='input', disable=hide) as bar:
      for i, tokens, scores in decoded:
        best = range(len(tokens) - 1, len(tokens) - 1 - num_decodes, -1)
        results[i] = [(self._texts.text(tokens[d]), scores[d]) for d in best]
        bar.update()
    return shaped(results, num_decodes == 1, return_scores)

  def _decode(
    self,
    ids: Sequence[list[int]],
    way: programs.Way,
    T: int,
    seed: int,
    batch_size: int,
  ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields (which input, tokens `[n, T]`, scores `[n]`, the best last)."""
    key = jax.random.key(seed, impl='threefry2x32')
    found = examples.batches([ids], batch_size) if ids else ()
    for number, batch in enumerate(found):
      prompts = np.zeros((len(batch.arrays[0]), T), np.int32)
      prompts[:, 0] = self._start
      tokens, scores = self._run(
        programs.decode,
        self._module,
        way,
        self._model_config.eos_token_id,
        self.params,
        batch.arrays[0],
        prompts,
        jax.random.key_data(jax.random.fold_in(key, number)),
      )
      rows = zip(batch.rows, np.asarray(tokens), np.asarray(scores), strict=False)
      yield from rows

  def loss(
    self,
    inputs: Sequence[Text],
    targets: Sequence[Text],
    *,
    batch_size: int = 8,
  ) -> float:
    """Returns the cross-entropy in nats a target token, the end marker included.

    Args:
      inputs, targets: as many; texts, to which the end marker is added, or token ids.
      batch_size: pairs that are computed together; padding does not count.
    """
    if isinstance(inputs, str) or isinstance(targets, str):
      raise BadInput('inputs and targets are lists: loss([text], [text])')
    inputs, targets = list(inputs), list(targets)
    if len(inputs) != len(targets):
      raise BadInput(f'{len(inputs)} inputs and {len(targets)} targets were given')
    pairs = list(zip(inputs, targets, strict=True))
    found = self._texts.examples(pairs)
    return self.evaluate(found, batch_size)['loss']

  def evaluate(
    self, found: Sequence[examples.Example], batch_size: int = 8
  ) -> dict[str, float]:
    """Returns 'loss' (nats) and 'accuracy', of a target token, and how many 'tokens'.

    Args:
      found: of `examples`.
    """
    totals = np.zeros(3)
    for batch in examples.batches(
      [[e.inputs for e in found], [e.targets for e in found]], batch_size
    ):
      sums = self._run(
        programs.score, self._module, self.params, *batch.arrays, self._start
      )
      totals += np.asarray(sums)
    if not totals[2]:
      raise BadInput('the targets have no token, so that there is no loss')
    loss, correct, tokens = totals / [totals[2], totals[2], 1]
    return {'loss': float(loss), 'accuracy': float(correct), 'tokens': int(tokens)}

  def examples(
    self,
    texts: Sequence[Any],
    *,
    input_length: int = 512,
    target_length: int = 128,
    seed: int = 0,
  ) -> list[examples.Example]:
    """Makes examples of texts: pairs as they are, single texts by span corruption.

    Args:
      texts: pairs (input, target), or single texts; a text is a string or token ids.
      input_length, target_length: longer pairs are cut to so many tokens; a longer
        single text is cut into several.
      seed: draws the spans.

    Raises:
      BadInput: no example is left.
    """
    rng = np.random.default_rng(seed)
    return self._texts.examples(texts, input_length, target_length, rng)

  # --- Out ----------------------------------------------------------------------

  def save(self, path: epath.PathLike) -> None:
    """Writes a checkpoint of T5X, with the tokenizer, into a folder.

    `load` reads it, and `t5x.train` as INITIAL_CHECKPOINT_PATH, by the name
    PATH/checkpoint_<step>, which is printed. Int8 weights are written as they are, half
    as large as bfloat16; those `load` alone reads.

    Raises:
      BadInput: the folder has a checkpoint of this step, or cannot be written.
    """
    target = saved.new_checkpoint(path, self._step)
    saved.write(target, *self._parts)
    of_t5x = not quantize.are_int8(self.params)
    print(f"INITIAL_CHECKPOINT_PATH = '{target}'" if of_t5x else target)

  def export(self, path: epath.PathLike, format: str, **options: Any) -> None:
    """Writes the model for other programs, as `python -m gqa_t5x.export` does.

    `format` is 'ctranslate2', 'huggingface', 'stablehlo' or 't5x'; options are the
    command's flags for it (docs/export.md). BadInput if `path` is there already.
    """
    int8.check_float(self.params, 'export')
    run.write(saved.source(*self._parts), path, format, **options)

  # --- Inside -------------------------------------------------------------------

  @property
  def _parts(self) -> tuple:
    return self.params, self._step, self._model_config, self._tokenizer_path

  @property
  def _start(self) -> int:
    return self._model_config.decoder_start_token_id

  def _changed(self, cfg: network.T5Config, params: Any) -> 'Model':
    return Model(
      cfg,
      params,
      self._model_config,
      self.tokenizer,
      tokenizer_path=self._tokenizer_path,
      step=self._step,
      model_partitions=self._model_partitions,
    )
