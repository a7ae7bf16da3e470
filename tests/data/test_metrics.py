"""The metrics of the benchmarks, against values worked out by hand."""

import math

import numpy as np
import pytest

from gqa_t5x.data import metrics

CAT, LAY = 'the cat sat on the mat', 'the cat lay on a mat'


def near(value: float):
  return pytest.approx(value, abs=1e-9)


# --- ROUGE: (target, prediction) -> ROUGE-1, ROUGE-2, ROUGE-Lsum in percent -----------

ROUGE = {
  'equal': (CAT, CAT, 100, 100, 100),
  # 4 of 6 words; "the cat" of 5 pairs; the cat - on - mat.
  'partly': (CAT, LAY, 400 / 6, 20, 400 / 6),
  # Precision 2/4, 1/3, 2/4; recall 1.
  'prediction longer': ('red green', 'red green blue pink', 200 / 3, 50, 200 / 3),
  'target longer': ('red green blue pink', 'red green', 200 / 3, 50, 200 / 3),
  # min(2, 3) of "the" counts.
  'repeated words': ('the the cat', 'the the the', 200 / 3, 50, 200 / 3),
  'no word in common': ('red', 'green', 0, 0, 0),
  'one word has no pairs': ('red', 'red', 100, 0, 100),
  'case and punctuation': ('Red, green!', 'red green', 100, 100, 100),
  'no stemming': ('cats', 'cat', 0, 0, 0),
  'empty prediction': (CAT, '', 0, 0, 0),
  'empty target': ('', CAT, 0, 0, 0),
  'both empty': ('', '', 0, 0, 0),
  # na, ve, caf: letters beyond a to z separate words; the second text has no others.
  'accents': ('naïve café', 'naïve café', 100, 100, 100),
  'other scripts': ('日本語', '日本語', 0, 0, 0),
  # Pairs: 2 of 3. Sentence by sentence all words are found, in a row only two.
  'swapped': ('One two. Three four.', 'Three four. One two.', 100, 200 / 3, 100),
  'swapped, as in arXiv': ('a b . \n c d .', 'c d . a b .', 100, 200 / 3, 100),
  'swapped, quoted': ('"A b!" C d?', 'C d? "A b!"', 100, 200 / 3, 100),
  'lines are sentences': ('One two.\nThree.', 'One two. Three.', 100, 100, 100),
}


@pytest.mark.parametrize('case', ROUGE)
def test_rouge(case):
  target, prediction, *expected = ROUGE[case]
  scores = metrics.rouge([target], [prediction])
  assert list(scores) == ['rouge1', 'rouge2', 'rougeLsum']
  assert list(scores.values()) == [near(value) for value in expected]


def test_rouge_is_the_mean_and_the_same_each_time():
  targets, predictions = [CAT, CAT, 'red'], [CAT, LAY, '']
  expected = {'rouge1': 500 / 9, 'rouge2': 40, 'rougeLsum': 500 / 9}
  for seed in range(3):
    np.random.seed(seed)  # noqa: NPY002 (what rouge-score's own aggregator reads)
    assert metrics.rouge(targets, predictions) == pytest.approx(expected, abs=1e-9)


# --- BLEU -----------------------------------------------------------------------------

BLEU = {
  'equal': ([CAT], [CAT], 100),
  # n-grams found: 5 of 6, 3 of 5, 2 of 4, 1 of 3.
  'partly': ([CAT], ['the cat sat on a mat'], 100 * (1 / 12) ** 0.25),
  # n-grams found: 5 of 6, 4 of 5, 3 of 4, 2 of 3.
  'cased': (['The' + CAT[3:]], [CAT], 100 * (1 / 3) ** 0.25),
  # All n-grams of 4 words are found; 6 are wanted.
  'too short': ([CAT], ['the cat sat on'], 100 * math.exp(1 - 6 / 4)),
  # 6 of 8, 5 of 7, 4 of 6, 3 of 5; too long costs nothing more.
  'prediction longer': ([CAT], [CAT + ' at noon'], 100 * (3 / 14) ** 0.25),
  # The international tokenizer makes German quotes tokens: 4 of 6. 13a does not.
  'quotes': (['„Das ist gut so“'], ['Das ist gut so'], 100 * math.exp(1 - 6 / 4)),
  # Over the corpus: 10 of 10, 8 of 8, 6 of 6, 4 of 4 n-grams, 10 words for 12.
  'corpus': ([CAT, CAT], [CAT, 'the cat sat on'], 100 * math.exp(1 - 12 / 10)),
  'empty prediction': ([CAT], [''], 0),
  'empty target': ([''], [CAT], 0),
}


@pytest.mark.parametrize('case', BLEU)
def test_bleu(case):
  targets, predictions, expected = BLEU[case]
  assert metrics.bleu(targets, predictions)['bleu'] == pytest.approx(expected, abs=1e-6)


def test_the_signature_says_how_bleu_is_counted(caplog):
  caplog.set_level('INFO', logger='absl')
  signature = metrics.bleu([CAT], [LAY])['bleu_signature'].textdata
  assert signature.startswith(
    'nrefs:1|case:mixed|eff:no|tok:intl|smooth:exp|version:2.'
  )
  assert signature in caplog.text


# --- TriviaQA: (answers, prediction) -> exact match, F1 -------------------------------

SUNSET = ['Sunset Boulevard', 'Sunset Blvd.']
TRIVIA_QA = {
  'equal': (SUNSET, 'Sunset Boulevard', 100, 100),
  'second answer, normalised': (SUNSET, 'The  sunset blvd', 100, 100),
  'half of the best answer': (SUNSET, 'Sunset Strip', 0, 50),
  # 2 of 6 words, 2 of 2.
  'prediction longer': (SUNSET, 'it is Sunset Boulevard in town', 0, 50),
  # The best answer for F1 is the second: 1 of 1, 1 of 2.
  'prediction shorter': (['one two three', 'one two'], 'one', 0, 200 / 3),
  'wrong': (SUNSET, 'Broadway', 0, 0),
  'empty prediction': (SUNSET, '', 0, 0),
  'articles alone': (SUNSET, 'the', 0, 0),
  'accents': (['Antonín Dvořák'], 'ANTONÍN DVOŘÁK', 100, 100),
  'quotes': (["O'Neill"], 'O’Neill', 100, 100),
  'hyphen and underscore': (['jean-paul'], 'jean_paul', 100, 100),
  'other scripts': (['東京', 'Tokyo'], '東京', 100, 100),
  # As in the official script: no words in common, and still equal.
  'answer of an article': (['The The'], '', 100, 0),
}


@pytest.mark.parametrize('case', TRIVIA_QA)
def test_trivia_qa(case):
  answers, prediction, exact, f1 = TRIVIA_QA[case]
  scores = metrics.trivia_qa([answers], [prediction])
  assert scores == {'em': near(exact), 'f1': near(f1)}


def test_trivia_qa_is_the_mean_over_questions():
  targets = [SUNSET, SUNSET, ['red'], ['green']]
  predictions = ['Sunset Blvd', 'Sunset Strip', 'blue', 'green']
  assert metrics.trivia_qa(targets, predictions) == {'em': near(50), 'f1': near(62.5)}


def test_a_question_without_answers_is_an_error():
  with pytest.raises(ValueError, match=r'question 1 of 2 has no answers.*validation'):
    metrics.trivia_qa([SUNSET, []], ['', ''])


@pytest.mark.parametrize('metric', [metrics.rouge, metrics.bleu, metrics.trivia_qa])
@pytest.mark.parametrize(('targets', 'predictions'), [(2, 1), (1, 2), (0, 1), (0, 0)])
def test_numbers_that_differ_are_an_error(metric, targets, predictions):
  target = SUNSET if metric is metrics.trivia_qa else CAT
  message = f'{targets} targets and {predictions} predictions'
  with pytest.raises(ValueError, match=message):
    metric([target] * targets, [CAT] * predictions)
