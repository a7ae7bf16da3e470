"""Reads tables out of a report in Markdown."""

import re


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
