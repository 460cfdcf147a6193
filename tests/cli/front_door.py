"""The command `fedsb` as the shell sees it: arguments in, exit code out."""

import sys

import pytest

from fedsb.cli.main import main


def call(*arguments: str) -> int:
    """Run the command in this process and return its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(sys, "argv", ["fedsb", *arguments])
        main()
    return int(left.value.code or 0)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail as a user's mistake: exit code 2, and one sentence, which is returned."""
    capsys.readouterr()
    assert call(*arguments) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fedsb: "), printed.err
    assert printed.out == ""
    return lines[0].removeprefix("fedsb: ")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must work, and return what it printed."""
    capsys.readouterr()
    assert call(*arguments) == 0
    return capsys.readouterr().out
