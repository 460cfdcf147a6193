"""Running a benchmark in this process, and what its last line must look like."""

import json
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The JSON object that was printed last."""
    result: dict[str, Any] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return result


def in_process(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """A stand-in for `harness.child` that starts no process."""

    def child(name: str, *arguments: str) -> dict[str, Any]:
        assert name == module.__name__
        module.main(arguments)
        return last_line(capsys)

    return child


def check(result: Mapping[str, Any], benchmark: str, keys: set[str]) -> None:
    """The shape that docs/design.md gives every benchmark's result."""
    assert set(result) == {"benchmark", "figures", "machine", "versions"}
    assert result["benchmark"] == benchmark
    assert set(result["figures"]) == keys
    for figure in result["figures"].values():
        assert {"value", "ours", "peer", "unit"} <= set(figure)
        assert figure["value"] is None or figure["value"] >= 0
        assert isinstance(figure["unit"], str)
    assert {"cpu", "cpus", "threads", "memory_bytes", "load"} <= set(result["machine"])
    assert {"python", "torch"} <= set(result["versions"])
