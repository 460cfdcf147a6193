"""The command `fedsb`: one file per command; a user's error is one sentence and exit code 2."""

import importlib
import logging
import os
import sys

from fedsb.deploy.quiet import QUIET

for name, value in QUIET.items():  # before flwr is imported
    os.environ.setdefault(name, value)

import typer  # noqa: E402

from fedsb.errors import FedsbError  # noqa: E402

for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):  # which tell what is for other machines, whenever PEFT sees them
    logging.getLogger(name).setLevel(logging.ERROR)

app = typer.Typer(
    name="fedsb",
    help="Fine-tune one language model across sites that cannot share their data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


COMMANDS = {
    "simulate": "simulate",
    "compare": "compare",
    "report": "report",
    "evaluate": "evaluate",
    "export": "export",
    "personalise": "personalise",
    "doctor": "doctor",
    "up": "up",
    "down": "up",
    "run": "run",
    "resume": "run",
    "status": "run",
    "logs": "run",
    "stop": "run",
    "site": "site",
    "privacy": "privacy",
    "certs": "certs",
    "init": "certs",
    "trainer": "trainer",
    "supernode": "supernode",
    "metrics": "metrics",
    "serve": "serve",
    "key": "key",
    "pack": "pack",
    "bench": "bench",
}  # command → its file in fedsb/cli


def register(wanted: str | None = None) -> None:
    """Import one command, or all: torch takes seconds, and `fedsb status` needs none of it."""
    known = {each.name for each in app.registered_commands} | {each.name for each in app.registered_groups}
    for name, file in COMMANDS.items():
        if name not in known and (wanted not in COMMANDS or wanted == name):
            command = getattr(importlib.import_module(f"fedsb.cli.{file}"), name)
            app.add_typer(command, name=name) if isinstance(command, typer.Typer) else app.command(name)(command)
    app.callback()(lambda: None)  # so that one command alone still goes by its name


def main() -> None:
    """Entry point."""
    register(sys.argv[1] if len(sys.argv) > 1 else None)
    try:
        app()
    except FedsbError as error:
        print(f"fedsb: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("fedsb: stopped; what is finished is on disk", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
