"""The reference pages, made from the code: `python -m fedsb.cli.reference configuration > docs/configuration.md`.

`tests/test_docs.py` holds the pages against what this prints, so they cannot drift.
"""

import inspect
import json
import sys
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types
import click
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedsb.cli.main import COMMANDS as KNOWN
from fedsb.cli.main import app, register
from fedsb.config import RunConfig
from fedsb.sections import CompareSection, TaskSection

CONFIGURATION = """\
# Configuration

A run is one TOML file that holds only what differs from the defaults below; `fedsb simulate FILE` runs it, and
`--set section.key=value` changes one setting for one run. An unknown key, a wrong type or a contradiction ends the command
before anything is written, with the key and what to do. The configuration as resolved lies in the run's `config.toml`; a
run is resumed only with the same one, `[runtime]` and `[track]` aside.

This page is made by `python -m fedsb.cli.reference configuration`.
"""
COMMANDS = """\
# Commands

Exit codes: 0 all is well; 1 `doctor` found something to mend; 2 a mistake in the input, told in one sentence; 130 stopped
with Ctrl-C. Environment: `FEDSB_CACHE` (where converted models are kept, by default `~/.cache/fedsb`), `FEDSB_HOME` (what a
client outside a simulation keeps, by default `~/.fedsb/sites`), `FEDSB_TRAINER` (the socket of a site's trainer),
`FEDSB_FEDERATION` (the folder of a federation, as `--home`).

This page is made by `python -m fedsb.cli.reference commands`.
"""
KINDS = {int: "whole number", float: "number", bool: "`true` or `false`", str: "text", NoneType: ""}
BOUNDS = {annotated_types.Gt: ">", annotated_types.Ge: "≥", annotated_types.Lt: "<", annotated_types.Le: "≤"}


def configuration_page() -> str:
    """docs/configuration.md."""
    fields = RunConfig.model_fields
    top = {name: field for name, field in fields.items() if _section_of(field.annotation) is None}
    parts = [CONFIGURATION, "## At the top of the file\n", _table(top)]
    for name, field in fields.items():
        section = _section_of(field.annotation)
        if section is not None:
            _, _, about = (section.__doc__ or "").strip().splitlines()[0].partition(": ")
            parts += [f"## `[{name}]`\n", f"{about[:1].upper()}{about[1:]}\n", _table(section.model_fields)]
            parts += _tasks(name) if name == "data" else []
    parts += ["## `[compare]`\n", "What `fedsb compare` runs and sets side by side; no other command takes it.\n"]
    parts += [_table(CompareSection.model_fields)]
    return "\n".join(parts)


def commands_page() -> str:
    """docs/commands.md."""
    register()
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    parts = [COMMANDS]
    for name, command in _all(group):
        assert command.callback is not None
        usage = " ".join([f"fedsb {name}", *_usage(command.params)])
        parts += [f"## `fedsb {name}`\n", f"{command.help}\n", f"```\n{usage}\n```\n"]
        told = get_type_hints(inspect.unwrap(command.callback), include_extras=True)  # of command.params click 8.5 loses it
        rows = [(_names(p), _default(p), _cell(told[str(p.name)].__metadata__[0].help or "")) for p in command.params]
        parts.append(_rows(("argument or option", "default", "meaning"), rows))
    return "\n".join(parts)


def _all(group: click.Group, before: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command with its name as typed, those of groups included, in the order of COMMANDS, whatever was registered first."""
    for name in group.commands if before else KNOWN:
        command = group.commands[name]
        if isinstance(command, click.Group):
            yield from _all(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def _tasks(section: str) -> list[str]:
    title = f"### `[[{section}.tasks]]` and `[basis.public]`\n"
    return [title, "Where the examples of one task come from.\n", _table(TaskSection.model_fields)]


def _section_of(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _table(fields: dict[str, FieldInfo]) -> str:
    rows = [
        (f"`{name}`", _cell(_values(field.annotation, field.metadata)), _shown(field), _cell(field.description or ""))
        for name, field in fields.items()
    ]
    return _rows(("key", "values", "default", "meaning"), rows)


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _values(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What may be written, for people: `auto` or number > 0."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [m for argument in arguments[1:] for m in getattr(argument, "metadata", [argument])]
        return _values(arguments[0], [*metadata, *inner])
    if origin in (Union, UnionType):
        return " or ".join(filter(None, (_values(argument, metadata) for argument in arguments)))
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin is tuple:
        return "tables" if _section_of(arguments[0]) else f"list of {_values(arguments[0]).replace('name ', 'names ', 1)}"
    if origin is dict or _section_of(annotation):
        return "table"
    bounds = " and ".join(f"{sign} {_limit(m)}" for m in metadata for kind, sign in BOUNDS.items() if isinstance(m, kind))
    named = any(getattr(m, "pattern", None) for m in metadata)
    return "name (a-z, 0-9, `.`, `_`, `-`)" if named else f"{KINDS[annotation]} {bounds}".strip()


def _limit(bound: Any) -> str:
    return f"{next(getattr(bound, name) for name in ('gt', 'ge', 'lt', 'le') if hasattr(bound, name)):g}"


def _shown(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True) if not field.is_required() else None
    if field.is_required():
        return "required"
    return "" if default in (None, (), {}) else f"`{json.dumps(default, ensure_ascii=False)}`"


def _usage(params: Sequence[click.Parameter]) -> Iterator[str]:
    for param in params:
        if isinstance(param, click.Argument):
            yield str(param.human_readable_name).upper()
        else:
            value = "" if _flag(param) else f" {_metavar(param)}"
            text = f"{param.opts[0]}{value}"
            yield text if param.required else f"[{text}]"


def _names(param: click.Parameter) -> str:
    if isinstance(param, click.Argument):
        return f"`{str(param.human_readable_name).upper()}`"
    return _cell(", ".join(f"`{name}`" if _flag(param) else f"`{name} {_metavar(param)}`" for name in param.opts))


def _metavar(param: click.Parameter) -> str:
    if param.metavar:
        return param.metavar
    if isinstance(param.type, click.Choice):
        return "|".join(str(getattr(choice, "value", choice)) for choice in param.type.choices)
    return param.type.name.upper()


def _flag(param: click.Parameter) -> bool:
    return isinstance(param, click.Option) and bool(param.is_flag)


def _default(param: click.Parameter) -> str:
    if param.required:
        return "required"
    value = getattr(param.default, "value", param.default)
    return "" if value in (None, False, "") or callable(value) else f"`{value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


PAGES = {"configuration": configuration_page, "commands": commands_page}

if __name__ == "__main__":
    if sys.argv[1:] not in ([name] for name in PAGES):
        sys.exit(f"usage: python -m fedsb.cli.reference {'|'.join(PAGES)}")
    print(PAGES[sys.argv[1]](), end="")
