"""A report in Markdown, and the same as one HTML page that needs no other file.

Every number of our own is tagged: its tag leads to its source (measured, compiled,
analytic) and to the command that made it.
"""

import base64
import html
import pathlib
import re
from collections.abc import Collection, Iterable, Sequence

import markdown

from gqa_t5x.reproduce.results.reader import Measured

NOT_RUN = 'not run'
FIGURES = 'figures'
PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root { color-scheme: light; }
  body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
         max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
  h1, h2, h3 { line-height: 1.25; margin: 2em 0 0.6em; }
  h1 { margin-top: 0; }
  h2 { border-bottom: 1px solid #ccc; padding-bottom: 0.2em; }
  .wide { overflow-x: auto; }
  table { border-collapse: collapse; font-size: 0.875rem; margin: 1em 0;
          font-variant-numeric: tabular-nums; }
  th, td { padding: 0.3em 0.55em; border-bottom: 1px solid #ddd; text-align: left;
           white-space: nowrap; }
  th { border-bottom: 2px solid #888; }
  img { width: 42rem; max-width: 100%; height: auto; }
  code, pre { font: 0.8125rem/1.5 ui-monospace, monospace; }
  code { overflow-wrap: anywhere; }
  pre { background: #f5f5f5; padding: 0.8em; overflow-x: auto; }
  sup { line-height: 0; }
  em { color: #444; }
  @media print { body { margin: 0; max-width: none; } }
</style>
</head>
<body>
{body}
</body>
</html>
"""


class Document:
  """Collects the parts of a report, in order.

  Attributes:
    has_gaps: whether a number was not there; whoever reads it may set it back.
  """

  def __init__(self, title: str):
    """Begins with a title."""
    self._title, self.has_gaps = title, False
    self._parts = [f'# {title}']
    self._tags: dict[tuple[str, tuple[str, ...]], str] = {}

  def text(self, *parts: str) -> None:
    """Adds paragraphs, or headings with their signs, in Markdown."""
    self._parts += parts

  def table(
    self,
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    left: Collection[int] = (0,),
  ) -> None:
    """Adds a table of cells; columns in `left` are set to the left."""
    marks = ['---' if i in left else '---:' for i in range(len(head))]
    lines = [f'| {" | ".join(line)} |' for line in (head, *rows)]
    lines.insert(1, f'|{"|".join(marks)}|')
    self._parts.append('\n'.join(lines))

  def image(self, path: str, text: str) -> None:
    """Adds a picture; the text is for those who cannot see it."""
    self._parts.append(f'![{text}]({path})')

  def figure(self, name: str, caption: str) -> None:
    """Adds a figure, a file in the folder FIGURES next to the report."""
    self.image(f'{FIGURES}/{name}', caption)
    self.text(f'*{caption}*')

  def not_run(self) -> str:
    """Returns the cell of a number that is not there, and notes that it is not."""
    self.has_gaps = True
    return NOT_RUN

  def number(
    self, number: Measured | None, digits: int, paper: float | None = None
  ) -> str:
    """Returns a cell: our number, its spread, its difference from the paper's, tag."""
    if number is None:
      return self.not_run()
    text = f'{round(number.mean, digits) + 0.0:.{digits}f}'  # No minus before a zero.
    if number.spread is not None:
      text += f' ± {number.spread:.{digits}f} (n = {len(number.values)})'
    if paper is not None:
      text += f' ({number.mean - paper:+.{digits}f})'
    return text + self._tag(number)

  def _tag(self, number: Measured) -> str:
    key = number.source, number.commands
    if key not in self._tags:
      count = sum(source == number.source for source, _ in self._tags)
      self._tags[key] = f'{number.source[0]}{count + 1}'
    name = self._tags[key]
    return f' <sup>[{name}](#{name})</sup>'

  def markdown(self) -> str:
    """Returns the whole report."""
    parts = list(self._parts)
    if self._tags:
      parts += ['## Sources', 'Each number of ours has a tag: where it comes from.']
      lines = []
      for (source, commands), name in self._tags.items():
        text = '<br>'.join(f'<code>{html.escape(c)}</code>' for c in commands)
        lines.append(f'- <a id="{name}"></a>**{name}** {source}: {text}')
      parts.append('\n'.join(lines))
    return '\n\n'.join(parts) + '\n'

  def html(self, folder: pathlib.Path) -> str:
    """Returns the report of a folder as a page with its figures inside."""
    body = markdown.markdown(self.markdown(), extensions=['tables'])

    def embed(match: re.Match) -> str:
      data = base64.b64encode((folder / match[1]).read_bytes()).decode()
      return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="([^":]+\.png)"', embed, body)
    body = re.sub(
      r'<table>.*?</table>', r'<div class="wide">\g<0></div>', body, flags=re.S
    )
    return PAGE.replace('{title}', html.escape(self._title)).replace('{body}', body)
