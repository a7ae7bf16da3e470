"""Metrics, as functions of targets and predictions for seqio tasks.

All are in percent, 0 to 100, the same on every run, and raise BadInput if there are no
examples or the numbers of targets and predictions differ. The package t5 has them, too,
but its ROUGE draws bootstrap samples from NumPy's global generator, and its BLEU leaves
out the signature.
"""

import re
from collections.abc import Sequence

import sacrebleu
import seqio
import t5.evaluation.metrics
from absl import logging
from rouge_score import rouge_scorer

from gqa_t5x.errors import BadInput

_ROUGE_TYPES = ('rouge1', 'rouge2', 'rougeLsum')
# The international tokenizer of mteval-v14. T5's metric has it, and so has
# tensor2tensor's BLEU, in which Shazeer (2019) counts. "13a" scores German a little
# lower, so the signature goes with the score.
_BLEU_TOKENIZER = 'intl'
_SENTENCE_END = re.compile(r'([.!?][\'")\]’”]*)\s+')


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
  """Returns the means over all examples of ROUGE-1, ROUGE-2 and ROUGE-Lsum.

  F-measures of rouge-score without stemming, as in T5. Its tokenizer lower-cases and
  keeps a to z and 0 to 9: other letters count for nothing. Lsum compares line by line,
  and T5's vocabulary has no line breaks, so each sentence gets a line of its own.

  Returns:
    `rouge1`, `rouge2` and `rougeLsum`; an empty text scores 0.

  Source: GQA section 3.1 (ROUGE-1); Lin (2004).
  """
  _check_lengths(targets, predictions)
  scorer = rouge_scorer.RougeScorer(_ROUGE_TYPES)
  scores = [
    scorer.score(*(_SENTENCE_END.sub(r'\1\n', text) for text in pair))
    for pair in zip(targets, predictions, strict=True)
  ]
  return {
    name: 100 * sum(score[name].fmeasure for score in scores) / len(scores)
    for name in _ROUGE_TYPES
  }


def bleu(
  targets: Sequence[str], predictions: Sequence[str]
) -> dict[str, float | seqio.metrics.Text]:
  """Returns corpus BLEU by sacrebleu, cased, and its signature.

  Returns:
    `bleu`, and `bleu_signature`, which says how it was computed. seqio writes both to
    its logs, to JSON and to TensorBoard.

  Source: GQA section 3.1; Post (2018).
  """
  _check_lengths(targets, predictions)
  metric = sacrebleu.metrics.BLEU(tokenize=_BLEU_TOKENIZER)
  score = metric.corpus_score(list(predictions), [list(targets)]).score
  signature = str(metric.get_signature())
  logging.info('BLEU = %.2f, signature %s', score, signature)
  return {'bleu': score, 'bleu_signature': seqio.metrics.Text(signature)}


def trivia_qa(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> dict[str, float]:
  """Returns TriviaQA's exact match and F1: of each question, the best over its answers.

  Both sides are normalised as by the official script: lower case, no punctuation, no
  articles, single spaces.

  Args:
    targets: of each question all answers that count as right.
    predictions: one answer a question.

  Returns:
    `em` and `f1`.

  Raises:
    BadInput: also if a question has no answers, as in TriviaQA's test split.

  Source: Joshi et al. (2017), the official evaluation script.
  """
  _check_lengths(targets, predictions)
  for i, answers in enumerate(targets):
    if not answers:
      raise BadInput(
        f'question {i} of {len(targets)} has no answers. Those of the test split are '
        'not published: evaluate on the split validation'
      )
  return t5.evaluation.metrics.trivia_qa(targets, predictions)


def squad(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
  """Returns exact match and F1 of words as for SQuAD, with one answer a question.

  Both sides are normalised as in `trivia_qa`.

  Returns:
    `em` and `f1`.

  Source: Rajpurkar et al. (2016), the official evaluation script.
  """
  _check_lengths(targets, predictions)
  return t5.evaluation.metrics.squad([[target] for target in targets], predictions)


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
  """Returns the share of texts that are equal, but for the amount of white space.

  Vocabularies such as T5's turn line breaks and repeated spaces into one space.

  Returns:
    `exact_match`.
  """
  _check_lengths(targets, predictions)
  pairs = zip(targets, predictions, strict=True)
  hits = sum(target.split() == prediction.split() for target, prediction in pairs)
  return {'exact_match': 100 * hits / len(targets)}


def _check_lengths(targets: Sequence, predictions: Sequence) -> None:
  if len(targets) != len(predictions) or not targets:
    raise BadInput(
      f'{len(targets)} targets and {len(predictions)} predictions: a metric needs as '
      'many of each, and at least one'
    )
