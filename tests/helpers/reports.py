"""Reads tables out of a report in Markdown, and the documented rows."""

import json
import pathlib
import re

DOCS = pathlib.Path(__file__).resolve().parents[2] / 'docs'


def documented(folder: str, **values) -> list[dict]:
  """Returns the rows of a folder of docs/ that have these values."""
  rows = json.loads((DOCS / folder / 'rows.json').read_text())
  return [row for row in rows if row | values == row]


def tables(text: str) -> list[list[list[str]]]:
  """Returns the cells of all tables, heads first, without tags."""
  text = re.sub(r' <sup>.*?</sup>', '', text)
  return [
    [
      [cell.strip() for cell in line.strip('| ').split(' | ')]
      for line in lines.splitlines()
      if not line.startswith('|---')
    ]
    for lines in re.findall(r'((?:^\|.*\n)+)', text, flags=re.MULTILINE)
  ]
