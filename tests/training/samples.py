"""Rows of unlike length, and tasks on disk."""

import json
from pathlib import Path

import torch

from fedsb.data.batches import Encoded


def rows(count: int = 6, seed: int = 0, vocabulary: int = 64) -> list[Encoded]:
    """Random examples: prompts of 1 to 6 tokens, completions of 1 to 4."""
    draw = torch.Generator().manual_seed(seed)

    def ids(most: int) -> list[int]:
        width = int(torch.randint(1, most + 1, (), generator=draw))
        found: list[int] = torch.randint(3, vocabulary, (width,), generator=draw).tolist()
        return found

    return [Encoded(ids(6), ids(4)) for _ in range(count)]


def labelled(count: int = 6, classes: int = 3, seed: int = 0) -> list[Encoded]:
    """The same as texts with labels."""
    return [Encoded(row.prompt, [], place % classes) for place, row in enumerate(rows(count, seed))]


def task(folder: Path, *lines: dict[str, str | int]) -> dict[str, str]:
    """A `jsonl:` task with these rows in both splits."""
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"name": "t", "source": f"jsonl:{folder}"}
