"""Says what a T5 would lose and gain with fewer key/value heads, on your own texts.

  python -m gqa_t5x.compare --input=flan-t5-base --texts=texts.txt \\
    --num_kv_heads=1,4,all --methods=mean,svd

converts the checkpoint, of any format, in memory, measures the loss of each result on
the texts right after the conversion, and times a decode step on this machine. A row
says, too, how much the cache of keys and values takes (bfloat16), and with --chip how
many inputs would fit on a chip, and what a step would take at its peaks (analytic).
The last line recommends one. --latent compares, beside K heads by svd, one head as
large as all K (the latent form of docs/conversion.md): the same cache, less loss.

--texts is a .txt file (a text a line), .jsonl, .tsv or .parquet, perhaps .gz or
.zst. Of single texts T5's span corruption makes inputs and targets. Of a model that was
fine-tuned, give pairs:

  python -m gqa_t5x.compare --input=my-model --texts=pairs.jsonl --keys=inputs,targets

--quantize compares int8 instead, with the heads that there are: the loss with weights,
cache, and both in int8, and the share of tokens of greedy decodes that are the float
model's.

Every second text calibrates the methods that use statistics (svd), the others are
judged on. --json keeps the rows as they are measured: the same command goes on there.
Nothing is written otherwise; python -m gqa_t5x.convert converts.
"""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from etils import epath
from tqdm import tqdm

import gqa_t5x
from gqa_t5x import command_line, files, quiet
from gqa_t5x.errors import BadInput

_CHIPS = ('v3', 'v4', 'v5e', 'v5p', 'v6e')
# What rows depend on: rows of others are not gone on with.
_SETTINGS = ('input', 'keys', 'document', 'max_texts', 'dtype', 'chip')
# What --quantize has no use for.
_OF_HEADS = ('num_kv_heads', 'methods', 'time', 'chip', 'tolerance', 'input_length')
_SETTINGS += ('batch_size', 'input_length', 'output_length')


def define_command() -> command_line.Command:
  """The command's flags."""
  command = command_line.Command('gqa_t5x.compare', __doc__)
  command.text('input', None, 'The checkpoint: a folder of Hugging Face or T5X.')
  command.text('texts', None, 'A file of texts, or of pairs.')
  command.words(
    'keys', 'text', 'Where a text is in .jsonl, .tsv, .parquet; two: a pair.'
  )
  command.choice(
    'document', 'line', ('line', 'paragraph', 'file'), 'A text of a .txt file.'
  )
  command.words('num_kv_heads', '1,all', 'Key/value heads; all: as they are.')
  command.words('methods', 'mean,svd', 'Of conversion, as of gqa_t5x.convert.')
  command.switch('latent', False, 'Compare one head as large as K together, too.')
  command.whole('max_texts', 128, 'Texts that are used, at most.', 2)
  command.text('tokenizer', None, 'Folder or file, if it is not beside the weights.')
  command.choice('dtype', 'float32', ('float32', 'bfloat16'), 'Of parameters.')
  command.whole('batch_size', 8, 'Texts, or inputs to decode, together.')
  command.whole('input_length', 512, 'Tokens of an input that is decoded.')
  command.whole('output_length', 64, 'Tokens that are decoded.', 4)
  command.switch('time', True, 'Time a decode step here.')
  command.choice('chip', None, _CHIPS, 'Say what a step takes on this one.')
  flags.DEFINE_float(
    'tolerance',
    0.05,
    'Nats that the recommended model may lose at once.',
    0.0,
    flag_values=command.values,
    module_name='gqa_t5x.compare',
  )
  command.switch('quantize', False, 'Compare int8, not heads.')
  command.text('json', None, 'Keep the rows in this file, and go on from there.')
  return command


def _act(args: flags.FlagValues) -> None:
  for name in ('input', 'texts'):
    if not args[name].value:
      raise BadInput(f'--{name} is missing; see --help for an example')
  if len(args.keys) > 2:
    raise BadInput(f'--keys={",".join(args.keys)}: give one, or two of a pair')
  for name in _OF_HEADS if args.quantize else ():
    if args[name].present:
      raise BadInput(f'--{name} is not for --quantize; leave one of them out')
  files.check_outputs(args.json)
  texts = _read(args)
  quiet.find_devices()
  from gqa_t5x.analysis import comparison  # here: --help need not wait for JAX

  model = gqa_t5x.load(args.input, dtype=args.dtype, tokenizer_path=args.tokenizer)
  if args.quantize:
    _compare_int8(args, model, texts[1::2])
    return
  cfg = model.config
  if cfg.self_kv != cfg.cross_kv:
    raise BadInput(
      f'{args.input} has {cfg.self_kv} key/value heads in self-attention and'
      f' {cfg.cross_kv} in cross-attention; here both must have as many'
    )
  print(model)
  chosen = comparison.choices(cfg, args.num_kv_heads, args.methods, args.latent)
  settings = {name: args[name].value for name in _SETTINGS}
  settings['texts'] = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
  rows = {_choice(row): row for row in _kept(args.json, settings)}
  left = [choice for choice in chosen if choice not in rows]
  lengths = args.input_length, args.output_length
  evaluation = model.examples(texts[1::2])
  measured = comparison.quality(model, left, texts[::2], evaluation, args.batch_size)
  for row in tqdm(measured, 'Comparing', len(left), unit='model', disable=None):
    choice = _choice(row)
    row |= comparison.costs(cfg, choice, args.chip, lengths, args.batch_size)
    rows[choice] = {'kind': 'comparison', 'source': 'measured', **row}
    _keep(args.json, settings, rows.values())
  found = [rows[choice] for choice in chosen]
  for row in found:
    row['loss_increase'] = row['loss'] - found[0]['loss']
  heads = dict.fromkeys((c.num_kv_heads, c.kv_head_dim) for c in chosen)
  if args.time and any('ms_per_step' not in row for row in found):
    times = comparison.decode_times(cfg, list(heads), lengths, args.batch_size, 5)
    timed = zip(heads, times, strict=True)
    for form, ms in tqdm(timed, 'Timing', len(heads), unit='model', disable=None):
      for row in found:
        is_timed = form == (row['num_kv_heads'], row['kv_head_dim'])
        row |= {'ms_per_step': ms} if is_timed else {}
  _keep(args.json, settings, rows.values())
  print(comparison.table(found))
  print(
    f'loss in nats a target token, on {len(evaluation)} examples of {args.texts}; a'
    f' step of batch {args.batch_size}, input {lengths[0]}'
  )
  print(comparison.recommendation(found, args.tolerance))


def _choice(row: dict[str, Any]) -> Any:
  from gqa_t5x.analysis import comparison

  return comparison.Choice(*(row[name] for name in comparison.Choice._fields))


def _compare_int8(args: flags.FlagValues, model: Any, texts: Sequence[Any]) -> None:
  from gqa_t5x.analysis import comparison

  evaluation = model.examples(texts)
  measured = comparison.int8_quality(
    model, evaluation, args.batch_size, args.output_length
  )
  rows = []
  for row in tqdm(measured, 'Comparing', 4, unit='model', disable=None):
    rows.append({'kind': 'int8_comparison', 'source': 'measured', **row})
  if args.json:
    files.write_json(args.json, rows)
  print(model)
  print(comparison.table(rows))
  print(
    f'loss in nats a target token, on {len(evaluation)} examples of {args.texts};'
    f' greedy decodes of at most {args.output_length} tokens'
  )


def _read(args: flags.FlagValues) -> list[Any]:
  """The first texts of the file, or pairs; BadInput if there are fewer than two."""
  from gqa_t5x.data.own import records

  if not epath.Path(args.texts).exists() or epath.Path(args.texts).is_dir():
    is_folder = epath.Path(args.texts).exists()
    raise BadInput(f'{args.texts} is {"a folder" if is_folder else "not there"}')
  texts: list[Any] = []
  found = records.readable(args.texts, args.keys, args.document, 'refuse', '--texts')
  for _, record in found:
    texts.append(tuple(record) if len(record) > 1 else record[0])
    if len(texts) == args.max_texts:
      break
  if len(texts) < 2:
    raise BadInput(
      f'{args.texts} has {len(texts)} texts; two are the least: one to calibrate, one'
      ' to judge on'
    )
  return texts


def _kept(path: str | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
  """Rows of an earlier run; BadInput if they are of other settings."""
  if not path or files.is_stream(path) or not epath.Path(path).exists():
    return []
  try:
    content = json.loads(epath.Path(path).read_bytes())
    rows, made_with = list(content['rows']), dict(content['settings'])
  except (ValueError, KeyError, TypeError) as error:
    raise BadInput(f'{path} is no file of this command: name another') from error
  different = [n for n, value in settings.items() if made_with.get(n) != value]
  if different:
    raise BadInput(
      f'{path} was made with other {", ".join(different)}; name another file'
    )
  return rows


def _keep(path: str | None, settings: dict[str, Any], rows: Any) -> None:
  if path:
    files.write_json(path, {'settings': settings, 'rows': list(rows)})


def main(argv: Sequence[str]) -> int:
  """The command; returns 0, 1 for bad input, 130 or 143 when stopped by a signal."""
  stopped = 'stopped; rows until then are in the file of --json, if there is one'
  return define_command().run(argv, _act, expected=(ValueError,), stopped=stopped)


if __name__ == '__main__':
  code = main(sys.argv)
  if code in (130, 143):  # A compiled program still runs: Python's own end would crash.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  sys.exit(code)
