"""One self-contained HTML page: what `fedsb report` writes. Nothing in it is loaded from anywhere, and it holds no script."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

State = Literal["good", "fair", "bad"]


@dataclass(frozen=True)
class Part:
    """A chart or a table. note: what one should see in it. wide: over the whole width."""

    title: str
    body: Markup
    note: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Page:
    """What a page says. Texts are plain, and escaped.

    Attributes:
        verdict: in a few words; `because`: a sentence or two that say why.
        facts: label, value: the figures that everybody asks for first.
    """

    title: str
    subtitle: str
    state: State
    verdict: str
    because: str
    facts: Sequence[tuple[str, str]]
    parts: Sequence[Part]


def html_of(page: Page) -> str:
    """The page."""
    template = (files("fedsb.report") / "page.html").read_text()
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(template).render(page=page)


def table_of(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> Markup:
    """A table whose first column names the rows."""
    head = Markup("").join(Markup("<th>{}</th>").format(each) for each in heads)
    body = [Markup("").join(Markup("<td>{}</td>").format(each) for each in row) for row in rows]
    lines = Markup("").join(Markup("<tr>{}</tr>").format(each) for each in body)
    return Markup("<div class=scroll><table><tr>{}</tr>{}</table></div>").format(head, escape(lines))
