"""The report: from what runs left to tables, without averaging in what is wrong."""

import contextlib
import dataclasses
import io
import json
import re
import shutil

import pytest
import tensorflow as tf

from gqa_t5x.reproduce.experiments import targets
from gqa_t5x.reproduce.experiments.models import MEAN, SVD, Model, mha
from gqa_t5x.reproduce.experiments.planner import Planner, step_of
from gqa_t5x.reproduce.experiments.scales import LOCAL, PAPER
from gqa_t5x.reproduce.report import papers
from gqa_t5x.reproduce.report.tables import training
from gqa_t5x.reproduce.results import intensity, reader
from gqa_t5x.reproduce.results.reader import Measured, Reader
from gqa_t5x.reproduce.studies.heads import LATENT, Variant
from helpers.reports import DOCS, documented, tables

TASK = 'pydocs_summarize'
SCORES = f'inference_eval/{TASK}-metrics.jsonl'
MQA = Model('tiny', 1, MEAN, 0.05)


def write_run(plan, model, task, seed, scores, metric='rouge1', **changes):
  """What T5X and seqio leave of a fine-tuning, as far as the report reads it."""
  stage = plan.finetuning(model, task, seed)
  folder = stage.result.parent
  stage.result.mkdir(parents=True)
  macros = {'MODEL_SIZE': model.size, 'NUM_KV_HEADS': None, **stage.macros, **changes}
  lines = [f'{k} = {str(v) if hasattr(v, "parts") else v!r}' for k, v in macros.items()]
  (folder / 'config.gin').write_text('# Macros:\n' + '\n'.join(sorted(lines)) + '\n')
  first = step_of(stage.result) - 10 * (len(scores) - 1)
  rows = [{'step': first + 10 * i, metric: score} for i, score in enumerate(scores)]
  file = folder / 'inference_eval' / f'{task}-metrics.jsonl'
  file.parent.mkdir()
  file.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return folder


def write_times(path, timing, seconds):
  """Rows of the decode benchmark from (num_kv_heads, beams) -> seconds per sample."""
  rows = [
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
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(rows))
  return rows


@pytest.fixture
def plan(tmp_path):
  return Planner(LOCAL, str(tmp_path))


def table_of(text, heading):
  """The cells of the first table below a heading."""
  return tables(text.split(f'### {heading}\n', 1)[1])[0]


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


def edited(change):
  """A function of a run's folder: changes the text of its scores."""
  return lambda folder: (folder / SCORES).write_text(
    change((folder / SCORES).read_text())
  )


@pytest.mark.parametrize(
  ('changes', 'damage', 'message'),
  [
    ({'NUM_KV_HEADS': 2}, None, 'is of another run: NUM_KV_HEADS is 2, not 1'),
    (
      {'INITIAL_CHECKPOINT_PATH': 'x/other/checkpoint_5/'},
      None,
      'it began from other/checkpoint_5, not tiny_mqa_mean/checkpoint_2520',
    ),
    (
      {},
      lambda folder: (folder / 'config.gin').unlink(),
      r'config\.gin is missing: nothing says what was run there\.',
    ),
    ({}, edited(lambda t: t + '{"step": 33'), 'line 3 of the scores of .* is damaged'),
    ({}, edited(lambda t: re.sub(r'1\d\.0', 'NaN', t)), 'no score is a number'),
    (
      {},
      edited(lambda t: t.splitlines()[0] + '\n'),
      r'partial: scored to step \d+10 of \d+20\.',
    ),
    (
      {},
      edited(lambda t: t.replace('rouge1', 'bleu')),
      'there is no rouge1; choose one of',
    ),
    ({}, edited(lambda t: ''), 'has no scores'),
  ],
)
def test_unusable_runs_are_skipped(plan, changes, damage, message):
  write_run(plan, MQA, TASK, 1, [10.0])
  folder = write_run(plan, MQA, TASK, 2, [14.0, 12.0], **changes)
  if damage:
    damage(folder)
  found = Reader()
  for _ in range(2):
    assert found.score(plan, MQA, TASK).values == (10.0,)
  (problem,) = found.problems
  assert str(folder) in problem
  assert re.search(message, problem)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda rows: rows[0].update(device='gpu'), 'is mixed: its rows differ in device'),
    (lambda rows: rows[0].update(source='guessed'), "whose source is 'guessed'"),
    (lambda rows: rows[0].update(size='xl'), "with size='xl', not 'base'"),
    (lambda rows: rows.clear(), "has no row of kind 'decode_benchmark'"),
    (lambda rows: rows[0].pop('kind'), 'is damaged'),
    (None, 'is damaged'),
  ],
)
def test_rows_that_do_not_belong_together_are_skipped(plan, change, message):
  path = plan.timing('figure6', LOCAL.heads).result
  rows = write_times(path, LOCAL.heads, {(12, 1): 2.0, (1, 1): 1.0})
  found = Reader()
  assert found.rows(path, 'decode_benchmark', size='base') == rows
  if change:
    change(rows)
  path.write_text(json.dumps(rows)[: None if change else -9])
  assert found.rows(path, 'decode_benchmark', size='base') == []
  (problem,) = found.problems
  assert problem.startswith(str(path))
  assert message in problem


def test_a_mean_needs_all_of_its_numbers():
  one, two = (Measured((x,), 'measured', (f'run {x}',)) for x in (1.0, 4.0))
  assert reader.mean([one, two]) == Measured((2.5,), 'measured', ('run 1.0', 'run 4.0'))
  assert reader.mean([one, None]) is None
  assert reader.mean([]) is None


def test_intensity_is_shazeers():
  rows = {
    (row['num_kv_heads'], row['batch_size'], row['input_length']): row['intensity']
    for row in intensity.rows()
  }
  # T5-XXL: d = 4096, h = 64.
  for heads in (64, 8, 1):
    expected = 1 / (2048 * heads / (4096 * 64) + 1 / 32)
    assert rows[heads, 32, 2048] == pytest.approx(expected)


# --- The report -----------------------------------------------------------------


def test_nothing_was_run(tmp_path):
  papers.write(str(tmp_path))
  text = (tmp_path / 'report.md').read_text()
  rows = table_of(text, 'Table 1 and figure 3')
  for model, theirs in (('MHA-XXL', '47.2'), ('GQA-8-XXL', '47.1')):
    paper, ours = (row for row in rows if row[0] == model)
    assert (paper[1], paper[3]) == ('paper', theirs)
    assert ours == [model, 'ours', *['not run'] * 9]
  # One line a target, with the command that prints its own.
  for target, count in (('table1', 65), ('figure6', 2), ('compiled', 26)):
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
  """A part of both scales is there: folder, report, what was said of it."""
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
  shazeer = dataclasses.replace(LOCAL.shazeer, size='shazeer_mqa')
  for name, timed, seconds in (
    (targets.timing_name(timing), timing, {(8, 1): 0.4, (2, 1): 0.2, (1, 1): 0.1}),
    ('figure6', LOCAL.heads, {(12, 1): 3.0, (1, 1): 1.0}),
    ('shazeer_mqa', shazeer, {(1, 1): 0.008, (1, 4): 0.02}),
  ):
    write_times(local.timing(name, timed).result, timed, seconds)
  with contextlib.redirect_stdout(io.StringIO()) as said:
    papers.write(str(folder))
  return folder, (folder / 'report.md').read_text(), said.getvalue()


def write_spikes(checkpoint):
  """What the trainer says of its loss, and the end of its run."""
  checkpoint.mkdir(parents=True)
  with tf.summary.create_file_writer(str(checkpoint.parent / 'train')).as_default():
    for step, spikes in ((100, 0), (200, 1), (300, 2)):
      tf.summary.scalar('stability/spikes', spikes, step)
      tf.summary.scalar('stability/divergences', 0, step)


def test_numbers_stand_next_to_the_papers(finished):
  text = finished[1]
  rows = table_of(text, 'Table 1 and figure 3')
  (ours,) = (row for row in rows if row[:2] == ['GQA-8-XXL', 'ours'])
  # The best of two checkpoints, 0.6 above the paper; no average of a part.
  assert ours[2:5] == ['not run', 'not run', '44.1 (+0.6)']
  assert ours[-1] == '80.0 (-1.6)'
  assert 'Not run: 63 commands' in text
  assert table_of(text, 'Table 1 and figure 3, tiny') == [
    ['model', '', 's/sample', TASK],
    ['MHA-Tiny', 'ours', '0.4000', '25.0'],
    ['MQA-Tiny', 'ours', '0.1000', '21.0 ± 1.0 (n = 3)'],
    ['GQA-2-Tiny', 'ours', '0.2000', 'not run'],
  ]
  heads = table_of(text, 'Figure 6: time against heads')
  assert heads[1] == ['12', '3.000', '3000.0']
  assert heads[3] == ['4', 'not run', 'not run']
  shazeer = table_of(text, "Shazeer's models, timed")[1:]
  # 8 ms for a batch of 2: 4 ms; the encoder's 1.024 ms over 2 x 64 tokens: 8 us.
  assert shazeer[2] == ['MQA', '5440', '209,748,480', '1', '1.5 + 3.8', '8.0', '4000.0']
  assert shazeer[0][-2:] == ['not run', 'not run']
  stability = table_of(text, 'Appendix A, tiny')
  assert stability[1][:4] == ['MQA-Tiny, from scratch', '2', '0', 'not run']


def test_every_number_leads_to_its_command(finished):
  used = set(re.findall(r'<sup>\[(\w+)\]\(#\1\)</sup>', finished[1]))
  defined = dict(re.findall(r'<a id="(\w+)"></a>\*\*\1\*\* (.*)', finished[1]))
  assert used
  assert used == set(defined)
  assert {tag[0] for tag in used} == {'m'}
  assert all(line.startswith('measured: <code>python -m ') for line in defined.values())
  # Three seeds, three commands.
  assert max(line.count('<code>') for line in defined.values()) == 3


def test_the_page_has_everything(finished):
  page = (finished[0] / 'report.html').read_text()
  assert '44.1 (+0.6)' in page
  figures = {path.name for path in (finished[0] / 'figures').glob('*.png')}
  assert {'figure3_paper.png', 'figure3_local.png', 'figure6_local.png'} <= figures
  assert page.count('data:image/png') == len(figures)


def test_the_first_figure_shows_the_model_that_lost_most(tmp_path):
  plan = Planner(LOCAL, str(tmp_path))
  shutil.copy(DOCS / 'training' / 'rows.json', targets.training_file(plan.output_dir))
  times = {(K, 1): 0.01 * K for K in LOCAL.heads.num_kv_heads}
  write_times(plan.timing('figure6', LOCAL.heads).result, LOCAL.heads, times)
  papers.write(str(tmp_path))
  text = (tmp_path / 'report.md').read_text().split('## Part 1')[0]
  assert 'the one that lost most of all tried (Adam, reversal, 4,000 steps)' in text
  assert (tmp_path / 'figures' / 'overview.png').exists()
  cost = training.costs(documented('training'), ('Adam, reversal', 4000))
  assert cost(Variant(SVD), 1, 0.05) == pytest.approx(0.076, abs=5e-4)  # docs/
  assert cost(LATENT, 2, 0.0) == pytest.approx(0.045, abs=5e-4)
  assert cost(LATENT, 1, 0.0) is None


def test_skipped_results_are_named(finished):
  _, text, said = finished
  problem = 'seed1 is of another run: NUM_KV_HEADS is 4, not 2.'
  assert problem in text.split('## Skipped results')[1].split('## ')[0]
  assert problem in said
