"""Texts as a model takes and gives them: token ids that end with its end marker."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gqa_t5x.errors import BadInput
from gqa_t5x.inference.examples import Example, of_text
from gqa_t5x.inference.tokenizer import Tokenizer

Text = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Texts:
  """The tokenizer of a model, None if it has none, and what the model knows of ids."""

  tokenizer: Tokenizer | None
  vocab_size: int
  eos_id: int

  def ids(self, text: Text, most: int | None = None) -> list[int]:
    """Returns at most so many ids of a text; the end marker stays where it is cut.

    Raises:
      BadInput: text without a tokenizer, or ids that the model does not have.
    """
    text = np.asarray(text) if hasattr(text, '__array__') else text  # JAX's, too.
    if not isinstance(text, str | Sequence | np.ndarray):
      raise BadInput(f'{text!r} is neither a text nor a list of token ids')
    if isinstance(text, str):
      return [*self._encode(text)[: most and most - 1], self.eos_id]
    wrong = [i for i in text if not self._is_id(i)]
    if wrong:
      raise BadInput(
        f'{wrong[0]!r} is no token id: the vocabulary has {self.vocab_size}'
      )
    return [int(i) for i in text][:most]

  def text(self, tokens: np.ndarray) -> Any:
    """Returns the text of ids up to the end marker; the ids without a tokenizer."""
    ids = tokens.tolist()
    if self.eos_id in ids:
      ids = ids[: ids.index(self.eos_id)]
    return ids if self.tokenizer is None else self.tokenizer.decode(ids)

  def examples(
    self,
    texts: Sequence[Any],
    input_length: int | None = None,
    target_length: int | None = None,
    rng: np.random.Generator | None = None,
  ) -> list[Example]:
    """Makes examples of texts; see `Model.examples`. No length: none is cut."""
    if isinstance(texts, str):
      raise BadInput('texts is one text; give a list')
    result: list[Example] = []
    for text in texts:
      if isinstance(text, tuple) or (isinstance(text, list) and _has_texts(text)):
        if len(text) != 2:
          raise BadInput(
            f'a pair has an input and a target, and this {len(text)} texts'
          )
        inputs, targets = text
        pair = self.ids(inputs, input_length), self.ids(targets, target_length)
        result.append(Example(*pair))
      else:
        ids = self._encode(text) if isinstance(text, str) else self.ids(text)
        result += of_text(ids, input_length, self._sentinel, self.eos_id, rng)
    if not result:
      raise BadInput(f'there is nothing in {len(texts)} texts, or they are too short')
    return result

  def _is_id(self, number: Any) -> bool:
    whole = isinstance(number, int | np.integer) and not isinstance(number, bool)
    return whole and 0 <= number < self.vocab_size

  def _encode(self, text: str) -> list[int]:
    if self.tokenizer is None:
      raise BadInput(
        'the model has no tokenizer: give token ids, or load it with tokenizer_path'
      )
    try:
      return self.tokenizer.encode(text)
    except UnicodeEncodeError as error:
      raise BadInput(f'{text[:40]!r} is no text: {error.reason}') from error

  @property
  def _sentinel(self) -> int:
    """The id of `<extra_id_0>`: the last that the tokenizer has."""
    size = self.tokenizer.size if self.tokenizer else self.vocab_size
    return min(size, self.vocab_size) - 1


def _has_texts(values: Sequence[Any]) -> bool:
  return any(isinstance(value, str) for value in values)


def shaped(
  results: Sequence[Sequence[tuple[Any, float]]], one: bool, with_scores: bool
) -> Any:
  """Texts, or lists of them, and with scores a pair of that and of the scores."""
  texts = [r[0][0] if one else [text for text, _ in r] for r in results]
  if not with_scores:
    return texts
  scores = [[float(score) for _, score in r] for r in results]
  return texts, [s[0] for s in scores] if one else scores
