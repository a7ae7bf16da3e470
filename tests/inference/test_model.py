"""The Python API, against transformers' golden arrays and the functions below it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gqa_t5x
from gqa_t5x.conversion import input_sums
from gqa_t5x.conversion.input_statistics import write_statistics
from gqa_t5x.conversion.plan import convert_params
from gqa_t5x.decoding import beam_search, generate, sampling
from gqa_t5x.errors import BadInput
from helpers import tokenizers_made as made
from helpers.golden_huggingface import GOLDEN, write

pytestmark = pytest.mark.usefixtures('quick_compilation')

ROWS = [row[row > 0].tolist() for row in GOLDEN['inputs']]
TEXT = 'the cat sat on the mat and a dog ate the cat on a mat'
PAIRS = [(TEXT[i:], TEXT[:20]) for i in range(12)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A T5 1.0 of two heads and 32 ids, and one of bytes."""
  return write(tmp_path_factory.mktemp('golden') / 't5', 't5_1_0')


@pytest.fixture(scope='module')
def byt5(tmp_path_factory):
  folder = write(tmp_path_factory.mktemp('golden') / 'byt5', 'byt5')
  made.write_bytes(folder)
  return gqa_t5x.load(folder)


def test_greedy_tokens_are_those_of_transformers(folder):
  model = gqa_t5x.load(folder)
  got = model.generate(ROWS, max_length=12)
  for tokens, expected in zip(got, GOLDEN['t5_1_0/greedy'].tolist(), strict=True):
    assert tokens == expected[: expected.index(1) if 1 in expected else 12]


def test_loss_is_that_of_transformers(folder):
  """Of targets of two lengths, padding left out."""
  logits = GOLDEN['t5_1_0/logits'].astype(np.float64)
  targets = [row[1:].tolist() for row in GOLDEN['decoder_inputs']]
  targets[1] = targets[1][:9]
  nats = []
  for row, ids in zip(logits, targets, strict=True):
    log_probs = row - np.log(np.exp(row).sum(-1, keepdims=True))
    nats += [-log_probs[t, i] for t, i in enumerate(ids)]
  got = gqa_t5x.load(folder).loss(ROWS, targets)
  np.testing.assert_allclose(got, np.mean(nats), rtol=1e-5)


def test_text_is_encoded_and_decoded(byt5):
  """An end marker goes behind the text, and none is in the result."""
  ids = [*(b + 3 for b in TEXT.encode()), 1]
  text, score = byt5.generate([TEXT], max_length=9, return_scores=True)
  tokens, expected = run(byt5, [ids], 9, sampling.greedy)
  cut = [i - 3 for i in tokens[0, 0].tolist() if 3 <= i < 259]
  assert text == [bytes(cut).decode(errors='ignore')]
  np.testing.assert_allclose(score, expected[:, 0], rtol=1e-5)


def run(model, rows, length, decode_fn, start=0, eos_id=1, **options):
  """`generate` on rows of one length."""
  padded = np.zeros((len(rows), 64), np.int32)
  for row, ids in zip(padded, rows, strict=True):
    row[: len(ids)] = ids
  prompts = jnp.zeros((len(rows), length), jnp.int32).at[:, 0].set(start)
  return jax.jit(
    lambda params: generate.generate(
      model._module,
      params,
      jnp.asarray(padded),
      prompts,
      decode_fn,
      eos_id=eos_id,
      **options,
    )
  )(model.params)


def test_batches_do_not_matter(byt5):
  """Results are in the order of the inputs, whatever is decoded together."""
  texts = ['a', TEXT, 'cat', TEXT[:40], '', 'on a mat']
  got = byt5.generate(texts, max_length=6, batch_size=3, return_scores=True)
  alone = [byt5.generate([t], max_length=6, return_scores=True) for t in texts]
  assert got[0] == [text for (text,), _ in alone]
  np.testing.assert_allclose(got[1], [s for _, (s,) in alone], rtol=1e-4)


def test_beams(folder):
  model = gqa_t5x.load(folder)
  got, scores = model.generate(
    ROWS, max_length=8, num_beams=4, num_decodes=3, alpha=0.3, return_scores=True
  )
  tokens, expected = run(
    model, ROWS, 8, beam_search.beam_search, num_decodes=4, alpha=0.3
  )
  for i in range(2):
    best = [row[row != 0].tolist() for row in np.asarray(tokens[i])[::-1][:3]]
    assert got[i] == [ids[: ids.index(1)] if 1 in ids else ids for ids in best]
  np.testing.assert_allclose(scores, np.asarray(expected)[:, ::-1][:, :3], rtol=1e-5)
  one = model.generate(ROWS, max_length=8, num_beams=4, alpha=0.3)
  assert one == [decodes[0] for decodes in got]


def test_samples(folder):
  """A seed gives the same again, another one others; their frequencies are right."""
  model = gqa_t5x.load(folder)
  options = {'max_length': 1, 'temperature': 2.0, 'num_decodes': 2000}
  drawn = model.generate(ROWS[:1], seed=1, **options)[0]
  assert drawn == model.generate(ROWS[:1], seed=1, **options)[0]
  assert drawn != model.generate(ROWS[:1], seed=2, **options)[0]
  probs = np.asarray(jax.nn.softmax(GOLDEN['t5_1_0/logits'][0, 0] / 2.0))
  likeliest = int(np.argmax(np.delete(probs, 1)))
  likeliest += likeliest >= 1
  share = np.mean([ids == [likeliest] for ids in drawn])
  assert abs(share - probs[likeliest]) < 5 * np.sqrt(probs[likeliest] / 2000)
  top = model.generate(ROWS[:1], topk=1, **options)[0]
  assert len({tuple(ids) for ids in top}) == 1


def test_start_token_and_end_marker_of_the_model(tmp_path):
  folder = write(tmp_path / 'a', 'mt5', decoder_start_token_id=5, eos_token_id=7)
  model = gqa_t5x.load(folder)
  tokens = model.generate(ROWS, max_length=12)
  expected, _ = run(model, ROWS, 12, sampling.greedy, start=5, eos_id=7)
  for got, row in zip(tokens, expected[:, 0].tolist(), strict=True):
    assert got == (row[: row.index(7)] if 7 in row else row)
  other = gqa_t5x.load(write(tmp_path / 'b', 'mt5'))
  assert model.loss(ROWS, ROWS) != pytest.approx(other.loss(ROWS, ROWS))


@pytest.mark.parametrize('method', ['mean', 'first', 'svd'])
def test_convert(method, folder):
  """Is `convert_params`; heads of one kind alone, too."""
  model = gqa_t5x.load(folder)
  got = model.convert(1, method)
  assert (got.config.self_kv, got.config.cross_kv) == (1, 1)
  expected = convert_params(model.params, num_kv_heads=1, method=method)
  jax.tree.map(np.testing.assert_array_equal, got.params, expected)
  got = model.convert(method=method, cross_attention_num_kv_heads=1)
  assert (got.config.self_kv, got.config.cross_kv) == (2, 1)
  assert model.config.cross_kv == 2  # The model itself stays.


def test_convert_with_texts(byt5, tmp_path):
  """Its statistics are those of each example alone, added up."""
  got = byt5.convert(1, texts=PAIRS, encoder_num_kv_heads=1, batch_size=5)
  sums_of = jax.jit(
    lambda params, batch: input_sums.sum_inputs(byt5._module, params, batch, True)
  )
  totals = {}
  for example in byt5.examples(PAIRS):
    inputs, targets = (
      np.pad([ids], ((0, 0), (0, length - len(ids)))).astype(np.int32)
      for ids, length in zip(example, (60, 30), strict=True)
    )
    batch = {
      'encoder_input_tokens': inputs,
      'decoder_input_tokens': np.pad(targets[:, :-1], ((0, 0), (1, 0))),
      'decoder_target_tokens': targets,
    }
    input_sums.add_sums(totals, sums_of(byt5.params, batch))
  file = str(tmp_path / 'statistics.npz')
  write_statistics(file, input_sums.mean_statistics(totals), {})
  recipe = {'num_kv_heads': 1, 'encoder_num_kv_heads': 1, 'statistics': file}
  expected = convert_params(byt5.params, method='svd', **recipe)
  for name in ('self_attention', 'encoder_decoder_attention'):
    a, b = (tree['decoder']['layers_0'][name] for tree in (got.params, expected))
    for left, right in (
      ('query', 'key'),
      ('value', 'out'),
    ):  # up to a turn of each head
      products = [x[left]['kernel'][:, :4] @ half(x[right]['kernel']) for x in (a, b)]
      np.testing.assert_allclose(*products, atol=2e-3)
  assert got.config.encoder_kv == 1


def half(kernel):
  """[D, 4], of the one head; or its transpose."""
  return kernel[:4] if kernel.shape[0] == 8 and kernel.shape[1] == 8 else kernel.T


def test_texts_make_pairs_by_span_corruption(byt5):
  (example,) = byt5.examples([TEXT])
  assert example.targets[0] == 258  # ByT5's first sentinel is its last byte.
  assert example.targets[-1] == example.inputs[-1] == 1
  pieces = byt5.examples([TEXT * 3], input_length=50)
  assert len(pieces) == -(-len(TEXT) * 3 // 50)


@pytest.mark.parametrize('K', [1, 2])
def test_save_and_load(K, byt5, tmp_path, capsys):
  model = byt5 if K == 2 else byt5.convert(1, 'mean')
  model.save(tmp_path / 'out')
  assert f"'{tmp_path}/out/checkpoint_0'" in capsys.readouterr().out
  again = gqa_t5x.load(tmp_path / 'out')
  assert again.config == model.config
  jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
  assert again.generate([TEXT], max_length=5) == model.generate([TEXT], max_length=5)
  with pytest.raises(BadInput, match='checkpoint_0 exists already'):
    model.save(tmp_path / 'out')


def test_what_shapes_do_not_show_is_saved(tmp_path):
  model = gqa_t5x.load(write(tmp_path / 'a', 'gated_silu', decoder_start_token_id=3))
  model.save(tmp_path / 'b')
  again = gqa_t5x.load(tmp_path / 'b')
  assert again.config.mlp_activations == ('silu', 'linear')
  assert again.loss(ROWS, ROWS) == model.loss(ROWS, ROWS)


def test_bfloat16(folder):
  model = gqa_t5x.load(folder, dtype='bfloat16')
  assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.bfloat16.dtype}
  close = gqa_t5x.load(folder).loss(ROWS, ROWS)
  assert model.loss(ROWS, ROWS) == pytest.approx(close, rel=0.05)
  assert model.convert(1).params['decoder']['decoder_norm']['scale'].dtype == 'bfloat16'


@pytest.mark.parametrize(('model_partitions', 'K'), [(1, 1), (2, 1), (2, 2)])
def test_sharded_over_all_devices(model_partitions, K, folder):
  one = gqa_t5x.load(folder).convert(K, 'mean')
  many = gqa_t5x.load(folder, model_partitions=model_partitions).convert(K, 'mean')
  kernel = many.params['decoder']['layers_0']['mlp']['wi']['kernel']
  assert len(kernel.sharding.device_set) == len(jax.devices())
  assert kernel.addressable_shards[0].data.shape == (8, 16 // model_partitions)
  rows = ROWS * 4
  options = {'max_length': 6, 'num_beams': 2, 'return_scores': True}
  tokens, scores = many.generate(rows, **options)
  expected = one.generate(rows, **options)
  assert tokens == expected[0]
  np.testing.assert_allclose(scores, expected[1], rtol=1e-4)
  np.testing.assert_allclose(many.loss(rows, rows), one.loss(rows, rows), rtol=1e-5)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda m: m.generate('text'), 'inputs is not a list of texts'),
    (lambda m: m.generate(['text']), 'the model has no tokenizer: give token ids'),
    (lambda m: m.generate([[3, 32]]), '32 is no token id: the vocabulary has 32'),
    (lambda m: m.generate([['a']]), "'a' is no token id"),
    (lambda m: m.generate([None]), 'None is neither a text nor a list of token ids'),
    (lambda m: m.generate([[3.5]]), '3.5 is no token id'),
    (lambda m: m.generate(ROWS, max_length=0), 'max_length=0 must be at least 1'),
    (
      lambda m: m.generate(ROWS, max_length=2.0),
      'max_length=2.0 must be a whole number',
    ),
    (lambda m: m.convert(num_kv_heads='2'), "num_kv_heads='2' must be a whole number"),
    (lambda m: m.generate(ROWS, num_beams=2, temperature=1.0), 'choose beam search or'),
    (lambda m: m.generate(ROWS, topk=3), 'topk=3, topp=0.0 are of sampling'),
    (lambda m: m.generate(ROWS, num_decodes=2), 'num_decodes=2 is more than num_beams'),
    (lambda m: m.generate(ROWS, temperature=-1.0), 'must not be negative'),
    (lambda m: m.generate(None), 'inputs is not a list of texts'),
    (lambda m: m.generate([[True]]), 'True is no token id'),
    (lambda m: m.generate(ROWS, max_input_length=0), 'max_input_length=0 must be'),
    (lambda m: m.generate(ROWS, temperature=1.0, topk=3, topp=0.5), 'not both'),
    (lambda m: m.generate(ROWS, temperature=1.0, topp=1.5), 'topp=1.5: give a topk'),
    (lambda m: m.loss('ab', 'cd'), 'inputs and targets are lists'),
    (lambda m: m.loss(ROWS, ROWS, batch_size=0), 'batch_size=0 must be at least 1'),
    (lambda m: m.loss([[3]], [[]]), 'the targets have no token'),
    (lambda m: m.convert(1, texts='a.txt'), 'texts is one text; give a list'),
    (lambda m: m.convert(1, texts=[('a', 'b', 'c')]), 'and this 3 texts'),
    (lambda m: m.convert(1, texts=ROWS, statistics='x'), 'texts and statistics were'),
    (lambda m: m.loss(ROWS, ROWS[:1]), '2 inputs and 1 targets were given'),
    (lambda m: m.loss([], []), 'there is nothing in 0 texts'),
    (lambda m: m.convert(), 'num_kv_heads is missing'),
    (lambda m: m.convert(3), 'num_heads=2 is not divisible by num_kv_heads=3'),
    (lambda m: m.convert(1, 'median'), "unknown method 'median'"),
    (lambda m: m.convert(1, 'mean', ROWS), "texts were given, and method='mean' uses"),
    (lambda m: m.convert(1, 'mean', ROWS, grouping='contiguous'), 'texts were'),
    (lambda m: m.convert(1, heads=2), 'convert knows no heads'),
  ],
)
def test_bad_input(call, message, folder):
  with pytest.raises(BadInput, match=re.escape(message)):
    call(gqa_t5x.load(folder))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'dtype': 'int8'}, "dtype='int8' is unknown; choose one of float32, bfloat16"),
    ({'tokenizer_path': 'nowhere'}, 'nowhere has no tokenizer'),
    ({'model_partitions': 0}, 'cannot be divided by 0 partitions'),
    ({'model_partitions': 3}, 'cannot be divided by 3 partitions'),
  ],
)
def test_bad_options_of_load(options, message, folder):
  with pytest.raises(BadInput, match=re.escape(message)):
    gqa_t5x.load(folder, **options)


def test_a_tokenizer_of_another_model(folder, tmp_path):
  place = made.write_sentencepiece(tmp_path)
  with pytest.raises(BadInput, match=r'has 120 ids, and the model .* 32: it is of'):
    gqa_t5x.load(folder, tokenizer_path=place)


def test_a_folder_of_another_model_is_not_saved_into(folder, byt5):
  with pytest.raises(BadInput, match='holds another model'):
    byt5.save(folder)


def test_text_that_is_none(byt5):
  with pytest.raises(BadInput, match='is no text: surrogates not allowed'):
    byt5.generate(['a\ud800'])


def test_pairs_may_be_lists(byt5):
  assert byt5.examples([list(PAIRS[0])]) == byt5.examples(PAIRS[:1])


@pytest.mark.parametrize('name', ['checkpoint_7', 'model'])
def test_a_tokenizer_above_is_that_of_a_run(name, tmp_path):
  """Beside checkpoints of a MODEL_DIR; what lies above another folder is not its."""
  made.write_bytes(tmp_path)
  folder = write(tmp_path / name, 'byt5')
  assert (gqa_t5x.load(folder).tokenizer is None) == (name == 'model')


def test_no_inputs(folder):
  assert gqa_t5x.load(folder).generate([]) == []


def test_the_api_is_short():
  assert gqa_t5x.__all__ == ['Model', 'load']
  with pytest.raises(AttributeError, match="no attribute 'laod'"):
    gqa_t5x.laod  # noqa: B018


def test_a_tokenizer_that_is_elsewhere_is_saved_along(byt5, tmp_path):
  folder = write(tmp_path / 't5', 'byt5')  # It has rows enough.
  file = made.write_sentencepiece(tmp_path / 'vocabulary') / 'spiece.model'
  file = file.rename(tmp_path / 'cc_all.model')
  model = gqa_t5x.load(folder, tokenizer_path=file)
  model.save(tmp_path / 'out')
  again = gqa_t5x.load(tmp_path / 'out')
  assert again.tokenizer.encode(TEXT) == model.tokenizer.encode(TEXT)
