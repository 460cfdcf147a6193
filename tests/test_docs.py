"""The pages that are made from the code say what the code says."""

import re
from pathlib import Path
from typing import get_type_hints

import pytest

from fedsb.cli.main import COMMANDS, app, register
from fedsb.cli.reference import PAGES
from fedsb.config import RunConfig
from fedsb.sections import CompareSection

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_what_the_code_makes(page: str) -> None:
    assert (DOCS / f"{page}.md").read_text() == PAGES[page](), f"run `python -m fedsb.cli.reference {page} > docs/{page}.md`"


def test_every_key_is_on_the_page() -> None:
    text = (DOCS / "configuration.md").read_text()
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()} | {"compare": CompareSection}
    for name, section in sections.items():
        if isinstance(section, type) and hasattr(section, "model_fields"):
            part = text.split(f"## `[{name}]`")[1].split("\n## ")[0]
            for key, inner in section.model_fields.items():
                assert re.search(rf"^\| `{key}` \| .+ \| .* \| {re.escape(str(inner.description)[:20])}", part, re.MULTILINE), key
        else:
            assert f"| `{name}` |" in text.split("## `[")[0]


def test_every_command_and_option_is_on_the_page() -> None:
    text = (DOCS / "commands.md").read_text()
    register()
    commands = {str(command.name): command for command in app.registered_commands}
    groups = {str(group.name): group.typer_instance for group in app.registered_groups}
    assert {*commands, *groups} == COMMANDS.keys()
    for name, group in groups.items():
        assert group is not None
        commands |= {f"{name} {c.name or c.callback.__name__}": c for c in group.registered_commands if c.callback}
    for typed, command in commands.items():
        assert command.callback is not None
        part = text.split(f"## `fedsb {typed}`")[1].split("\n## ")[0]
        hints = get_type_hints(command.callback, include_extras=True)
        hints.pop("return")
        assert part.count("\n| `") == len(hints)
        for name, hint in hints.items():
            about = hint.__metadata__[0].help
            assert about, f"{name} of {command.callback.__name__} has no help"
            assert about in part


def test_no_table_has_a_torn_row() -> None:
    for page in PAGES:
        widths = [
            len(re.findall(r"(?<!\\)\|", line)) for line in (DOCS / f"{page}.md").read_text().splitlines() if line.startswith("|")
        ]
        assert set(widths) == {5 if page == "configuration" else 4}
