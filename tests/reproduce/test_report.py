"""The report: from what runs left to tables, without averaging in what is wrong."""

import contextlib
import dataclasses
import io
import json
import re

import pytest
import tensorflow as tf

from gqa_t5x.reproduce.experiments import targets
from gqa_t5x.reproduce.experiments.models import MEAN, converted, mha
from gqa_t5x.reproduce.experiments.planner import Planner, step_of
from gqa_t5x.reproduce.experiments.scales import LOCAL, PAPER
from gqa_t5x.reproduce.report import papers
from gqa_t5x.reproduce.results import intensity, reader
from gqa_t5x.reproduce.results.reader import Measured, Reader

TASK = 'pydocs_summarize'
MQA = converted('tiny', 1, MEAN, 0.05)


def write_run(plan, model, task, seed, scores, metric='rouge1', **changes):
  """What T5X and seqio leave of a fine-tuning, as far as the report reads it."""
  stage = plan.finetuning(model, task, seed)
  folder = stage.result.parent
  stage.result.mkdir(parents=True)
  (folder / 'inference_eval').mkdir()
  macros = {'MODEL_SIZE': model.size, 'NUM_KV_HEADS': None, **stage.macros, **changes}
  lines = [f'{k} = {str(v) if hasattr(v, "parts") else v!r}' for k, v in macros.items()]
  (folder / 'config.gin').write_text('# Macros:\n' + '\n'.join(sorted(lines)) + '\n')
  last = step_of(stage.result)
  rows = [{'step': last - 10 * i, metric: s} for i, s in enumerate(reversed(scores))]
  text = '\n'.join(json.dumps(row) for row in reversed(rows)) + '\n'
  file = folder / 'inference_eval' / f'{task}-metrics.jsonl'
  file.write_text(text)
  return folder, file


def decode_rows(timing, seconds):
  """Rows of the decode benchmark: num_kv_heads -> seconds per sample."""
  return [
    {
      'kind': 'decode_benchmark',
      'source': 'measured',
      'command': f'python -m gqa_t5x.benchmark decode --size={timing.size}',
      'size': timing.size,
      'num_kv_heads': heads,
      'batch_size': 2,
      'input_length': 512,
      'output_length': 64,
      'num_beams': beams,
      'dtype': 'float32',
      'device': 'cpu, 2 cores',
      'versions': {'jax': '1'},
      'seconds_per_sample': value,
      'ms_per_step': 1000 * value,
      'encode_ms': 128 * value,
    }
    for (heads, beams), value in seconds.items()
  ]


def write_rows(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(rows))


@pytest.fixture
def plan(tmp_path):
  return Planner(LOCAL, str(tmp_path))


def table_of(text, heading):
  """The cells of the first table below a heading, without tags."""
  after = text.split(f'### {heading}\n', 1)[1]
  lines = re.search(r'(\|.*\n)+', after)[0].splitlines()
  cells = [re.split(r' \| ', line.strip('| ')) for line in [lines[0], *lines[2:]]]
  return [[re.sub(r' <sup>.*</sup>', '', c).strip() for c in row] for row in cells]


# --- Results --------------------------------------------------------------------


def test_the_best_score_of_every_seed(plan):
  for seed, scores in ((1, [10.0, 14.0, 12.0]), (2, [9.0, 15.5]), (3, [13.0, 11.0])):
    write_run(plan, MQA, TASK, seed, scores)
  found = Reader()
  number = found.score(plan, MQA, TASK)
  assert number.values == (14.0, 15.5, 13.0)
  assert number.mean == pytest.approx(42.5 / 3)
  assert number.spread == pytest.approx(1.2583057)
  assert number.source == 'measured'
  assert [c.count('RANDOM_SEED') for c in number.commands] == [1, 1, 1]
  assert found.problems == []
  assert found.score(plan, mha('tiny'), TASK) is None


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'NUM_KV_HEADS': 2}, 'is of another run: NUM_KV_HEADS is 2, not 1'),
    ({'MODEL_SIZE': 'mini'}, "MODEL_SIZE is 'mini', not 'tiny'"),
    ({'RANDOM_SEED': 7}, 'RANDOM_SEED is 7, not 2'),
    (
      {'INITIAL_CHECKPOINT_PATH': 'x/other/checkpoint_5/'},
      'it began from other/checkpoint_5, not tiny_mqa_mean/checkpoint_2520',
    ),
  ],
)
def test_a_run_of_something_else_is_skipped(plan, changes, message):
  write_run(plan, MQA, TASK, 1, [10.0])
  folder, _ = write_run(plan, MQA, TASK, 2, [99.0], **changes)
  found = Reader()
  assert found.score(plan, MQA, TASK).values == (10.0,)
  (problem,) = found.problems
  assert str(folder) in problem
  assert message in problem
  found.score(plan, MQA, TASK)
  assert len(found.problems) == 1


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (lambda text: text + '{"step": 33', 'line 3 of the scores of .* is damaged'),
    (lambda text: text.replace('14.0', 'NaN').replace('12.0', 'NaN'), 'no score is a'),
    (
      lambda text: text.splitlines()[0] + '\n',
      r'partial: scored to step \d+10 of \d+20\.',
    ),
    (lambda text: text.replace('rouge1', 'bleu'), 'there is no rouge1; choose one of'),
    (lambda text: '', 'has no scores'),
  ],
)
def test_damaged_scores_are_skipped(plan, damage, message):
  folder, file = write_run(plan, MQA, TASK, 1, [14.0, 12.0])
  file.write_text(damage(file.read_text()))
  found = Reader()
  assert found.score(plan, MQA, TASK) is None
  (problem,) = found.problems
  assert re.search(message, problem)
  assert str(folder) in problem


def test_a_run_without_configuration_is_skipped(plan):
  folder, _ = write_run(plan, MQA, TASK, 1, [14.0])
  (folder / 'config.gin').unlink()
  found = Reader()
  assert found.score(plan, MQA, TASK) is None
  assert found.problems == [
    f'{folder}/config.gin is missing: nothing says what was run there.'
  ]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda rows: rows[0].update(device='gpu'), 'is mixed: its rows differ in device'),
    (lambda rows: rows[0].update(versions={}), 'is mixed: its rows differ in versions'),
    (lambda rows: rows[0].update(source='compiled'), 'rows differ in source'),
    (lambda rows: rows[0].update(source='guessed'), "whose source is 'guessed'"),
    (lambda rows: rows[0].update(size='xl'), "with size='xl', not 'base'"),
    (lambda rows: rows.clear(), "has no row of kind 'decode_benchmark'"),
    (lambda rows: rows[0].pop('kind'), 'is damaged'),
  ],
)
def test_rows_that_do_not_belong_together_are_skipped(plan, change, message):
  path = plan.timing('figure6', LOCAL.heads).result
  rows = decode_rows(LOCAL.heads, {(12, 1): 2.0, (1, 1): 1.0})
  write_rows(path, rows)
  found = Reader()
  assert found.rows(path, 'decode_benchmark', size='base') == rows
  change(rows)
  write_rows(path, rows)
  assert found.rows(path, 'decode_benchmark', size='base') == []
  (problem,) = found.problems
  assert problem.startswith(str(path))
  assert message in problem


def test_a_partial_file_of_rows_is_skipped(plan):
  path = plan.timing('figure6', LOCAL.heads).result
  write_rows(path, decode_rows(LOCAL.heads, {(12, 1): 2.0}))
  path.write_text(path.read_text()[:-9])
  found = Reader()
  assert found.rows(path, 'decode_benchmark') == []
  assert 'is damaged' in found.problems[0]


def test_a_mean_needs_all_of_its_numbers():
  one, two = (Measured((x,), 'measured', (f'run {x}',)) for x in (1.0, 4.0))
  assert reader.mean([one, two]) == Measured((2.5,), 'measured', ('run 1.0', 'run 4.0'))
  assert reader.mean([one, None]) is None
  assert reader.mean([]) is None


# --- The report -----------------------------------------------------------------


def test_nothing_was_run(tmp_path):
  papers.write(str(tmp_path))
  text = (tmp_path / 'report.md').read_text()
  for model, theirs in (('MHA-XXL', '47.2'), ('GQA-8-XXL', '47.1')):
    rows = table_of(text, 'Table 1 and figure 3')
    ours = [row for row in rows if row[:2] == [model, 'ours']]
    assert ours == [[model, 'ours', *['not run'] * 9]]
    (paper,) = (row for row in rows if row[:2] == [model, 'paper'])
    assert paper[3] == theirs
  # One line a target, with the command that prints its own.
  for target, count in (('table1', 52), ('figure6', 1), ('compiled', 23)):
    noun = 'command' if count == 1 else 'commands'
    assert (
      f'Not run: {count} {noun}, which `python -m gqa_t5x.reproduce plan {target}'
      f' --scale=paper --output_dir={tmp_path}` prints.\n' in text
    )
  assert text.count('\nNot run: ') == len(papers.PAPER_PARTS) + len(papers.LOCAL_PARTS)
  assert '## Skipped results\n\nNone.\n' in text
  assert '## Sources' not in text
  page = (tmp_path / 'report.html').read_text()
  assert 'src="data:image/png;base64,' in page
  assert not re.search(r'(src|href)="(?!data:|#)', page)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A part of both scales is there: the folder, and what was said of the report."""
  folder = tmp_path_factory.mktemp('finished')
  paper, local = Planner(PAPER, str(folder)), Planner(LOCAL, str(folder))
  gqa = PAPER.models[3]
  write_run(paper, gqa, 'cnn_dailymail', 1, [43.0, 44.1])
  write_run(paper, gqa, 'trivia_qa', 1, [80.0], metric='f1')
  for seed, score in ((1, 20.0), (2, 21.0), (3, 22.0)):
    write_run(local, MQA, TASK, seed, [score])
  write_run(local, mha('tiny'), TASK, 1, [25.0])
  write_run(local, LOCAL.models[2], TASK, 1, [30.0], NUM_KV_HEADS=4)
  write_spikes(local.checkpoint(LOCAL.scratch[0]).result)
  (timing,) = LOCAL.timings
  for name, timed, seconds in (
    (targets.timing_name(timing), timing, {(8, 1): 0.4, (2, 1): 0.2, (1, 1): 0.1}),
    ('figure6', LOCAL.heads, {(12, 1): 3.0, (1, 1): 1.0}),
  ):
    write_rows(local.timing(name, timed).result, decode_rows(timed, seconds))
  timed = dataclasses.replace(LOCAL.shazeer, size='shazeer_mqa')
  path = targets.shazeer_timing(local, 'MQA').result
  write_rows(path, decode_rows(timed, {(1, 1): 0.008, (1, 4): 0.02}))
  with contextlib.redirect_stdout(io.StringIO()) as said:
    papers.write(str(folder))
  return folder, said.getvalue()


def write_spikes(checkpoint):
  """What the trainer says of its loss, and the end of its run."""
  checkpoint.mkdir(parents=True)
  with tf.summary.create_file_writer(str(checkpoint.parent / 'train')).as_default():
    for step, spikes in ((100, 0), (200, 1), (300, 2)):
      tf.summary.scalar('stability/spikes', spikes, step)
      tf.summary.scalar('stability/divergences', 0, step)


def test_numbers_stand_next_to_the_papers(finished):
  text = (finished[0] / 'report.md').read_text()
  rows = table_of(text, 'Table 1 and figure 3')
  (ours,) = (row for row in rows if row[:2] == ['GQA-8-XXL', 'ours'])
  # The best of two checkpoints, 0.6 above the paper; no average of a part.
  assert ours[2:5] == ['not run', 'not run', '44.1 (+0.6)']
  assert ours[-1] == '80.0 (-1.6)'
  assert 'Not run: 50 commands' in text
  local = table_of(text, 'Table 1 and figure 3, tiny')
  assert local[0] == ['model', '', 's/sample', TASK]
  assert local[1:] == [
    ['MHA-Tiny', 'ours', '0.4000', '25.0'],
    ['MQA-Tiny', 'ours', '0.1000', '21.0 ± 1.0 (n = 3)'],
    ['GQA-2-Tiny', 'ours', '0.2000', 'not run'],
  ]
  heads = {row[0]: row[1:] for row in table_of(text, 'Figure 6: time against heads')}
  assert heads['12'] == ['3.000', '3000.0']
  assert heads['4'] == ['not run', 'not run']
  shazeer = table_of(text, "Shazeer's models, timed")[1:]
  # 8 ms for a batch of 2: 4 ms; the encoder's 1.024 ms over 2 x 64 tokens: 8 us.
  assert shazeer[2] == ['MQA', '5440', '209,748,480', '1', '1.5 + 3.8', '8.0', '4000.0']
  assert shazeer[0][-2:] == ['not run', 'not run']


def test_every_number_leads_to_its_command(finished):
  text = (finished[0] / 'report.md').read_text()
  used = set(re.findall(r'<sup>\[(\w+)\]\(#\1\)</sup>', text))
  defined = dict(re.findall(r'<a id="(\w+)"></a>\*\*\1\*\* (.*)', text))
  assert used
  assert used == set(defined)
  assert {tag[0] for tag in used} == {'m'}
  assert all(line.startswith('measured: <code>python -m ') for line in defined.values())
  # Three seeds, three commands.
  assert sorted(line.count('<code>') for line in defined.values())[-1] == 3


def test_the_page_has_everything(finished):
  page = (finished[0] / 'report.html').read_text()
  assert '44.1 (+0.6)' in page
  figures = {path.name for path in (finished[0] / 'figures').glob('*.png')}
  assert {'figure3_paper.png', 'figure3_local.png', 'figure6_local.png'} <= figures
  assert page.count('data:image/png') == len(figures)


def test_skipped_results_are_named(finished):
  folder, said = finished
  text = (folder / 'report.md').read_text()
  problem = 'seed1 is of another run: NUM_KV_HEADS is 4, not 2.'
  assert problem in text.split('## Skipped results')[1].split('## ')[0]
  assert problem in said


def test_spikes_are_counted(finished):
  text = (finished[0] / 'report.md').read_text()
  rows = table_of(text, 'Appendix A, tiny')
  assert rows[1][:4] == ['MQA-Tiny, from scratch', '2', '0', 'not run']


def test_intensity_is_shazeers():
  rows = {
    (row['num_kv_heads'], row['batch_size'], row['input_length']): row['intensity']
    for row in intensity.rows()
  }
  # T5-XXL: d = 4096, h = 64.
  assert rows[64, 32, 2048] == pytest.approx(1 / (2048 / 4096 + 1 / 32))
  assert rows[1, 32, 2048] == pytest.approx(1 / (2048 / (4096 * 64) + 1 / 32))
  assert rows[8, 32, 2048] == pytest.approx(1 / (2048 * 8 / (4096 * 64) + 1 / 32))
