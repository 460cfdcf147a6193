"""What several commands have in common: how much they say, and what to type to go on after Ctrl-C."""

import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, NoReturn

import typer

from fedsb.config import RunConfig

Json = Annotated[bool, typer.Option("--json", help="for programs: one JSON object a line, the result last")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress, only the result")]


def told(run: RunConfig, json_: bool, quiet: bool) -> RunConfig:
    """A configuration that shows its progress as the options say; without any, as it is."""
    if not (json_ or quiet):
        return run
    progress = "none" if quiet else "json"
    return run.model_copy(update={"runtime": run.runtime.model_copy(update={"progress": progress})})


def say(event: str, fields: Mapping[str, Any]) -> None:
    """One JSON object on a line of its own, flushed at once."""
    print(json.dumps({"event": event, **fields}), flush=True)


def command(*words: object, changes: Iterable[str] | None = None, **options: object) -> str:
    """A command as it would be typed: words, then options that are not None, then each of `--set`."""
    given = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
    changed = [part for change in changes or () for part in ("--set", change)]
    return shlex.join(["fedsb", *map(str, words), *given, *changed])


def stopped(what_now: str) -> NoReturn:
    """End after Ctrl-C with one sentence and exit code 130."""
    print(f"fedsb: stopped; {what_now}", file=sys.stderr)
    raise typer.Exit(130) from None
