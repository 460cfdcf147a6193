"""The study's table is what the kept results say."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import study

ROOT = Path(__file__).parents[2]


def _line(losses: list[float], basis: int, moved: int) -> dict[str, Any]:
    return {"history": [{"loss": loss} for loss in losses], "bytes": {"basis": basis, "up": moved, "down": moved}}


@pytest.mark.parametrize(("loss", "expected"), [(2.0, 100 + 50), (1.2, 100 + 150), (0.1, None)])
def test_bytes_are_counted_up_to_the_first_round_with_the_loss(loss: float, expected: float | None) -> None:
    """Two seeds: their mean loss is 2, 1.5, 1, 0.5; each round moves 50 bytes."""
    lines = [_line([2.5, 2.0, 1.0, 0.5], 100, 100), _line([1.5, 1.0, 1.0, 0.5], 100, 100)]
    assert study.bytes_to(lines, loss) == expected


def test_the_page_has_the_table_of_the_kept_results() -> None:
    assert study.table_of() in (ROOT / "docs/study.md").read_text(), "python -m benchmarks.study prints it"
