"""The command `fedsb`: one file per command; a user's error is one sentence and exit code 2."""

import os
import sys

# Before flwr is imported: no telemetry, no update checks, no installation of packages while a run starts.
for name, value in (
    ("FLWR_TELEMETRY_ENABLED", "0"),
    ("FLWR_DISABLE_UPDATE_CHECK", "1"),
    ("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1"),
):
    os.environ.setdefault(name, value)

import typer  # noqa: E402

from fedsb.errors import FedsbError  # noqa: E402

app = typer.Typer(
    name="fedsb",
    help="Fine-tune one language model across sites that cannot share their data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _register() -> None:
    from fedsb.cli import doctor, evaluate, export, simulate, trainer

    app.command()(simulate.simulate)
    app.command()(evaluate.evaluate)
    app.command()(export.export)
    app.command()(doctor.doctor)
    app.command()(trainer.trainer)


_register()


def main() -> None:
    """Entry point."""
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
