"""The Python of the README, as it stands there."""

import pathlib
import re

import pytest

import gqa_t5x
from helpers import tokenizers_made as made

pytestmark = pytest.mark.usefixtures('quick_compilation')

README = pathlib.Path(__file__).parents[2] / 'README.md'


def test_the_readmes_lines_run(tmp_path, monkeypatch, capsys):
  (code,) = re.findall(r'```python\n(.*?)```', README.read_text(), re.DOTALL)
  monkeypatch.chdir(tmp_path)
  made.write_flan('flan-t5-base', num_heads=8)
  (tmp_path / 'texts.txt').write_text('\n'.join(made.TEXTS))
  names = {}
  exec(compile(code, str(README), 'exec'), names)
  assert names['fast'].config.cross_kv == names['fast'].config.self_kv == 4
  written = capsys.readouterr().out.splitlines()
  assert written[0].startswith("['")
  assert written[-1].endswith("flan-t5-base-gqa4/checkpoint_0'")
  again = gqa_t5x.load('flan-t5-base-gqa4')
  question = ['translate English to German: How are you?']
  options = {'max_length': 64, 'num_beams': 4}
  assert str(again.generate(question, **options)) == written[0]
