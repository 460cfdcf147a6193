"""What data a simulated run is about, in one number."""

import hashlib
import json
from collections.abc import Iterator

from fedsb.config import RunConfig
from fedsb.data.examples import Example
from fedsb.data.sites import all_parts, public_examples
from fedsb.data.tasks import Split, labels_of


def data_fingerprint(config: RunConfig) -> str:
    """SHA-256 over all that a simulation of the run trains and scores on, whatever its source: each client's examples of both
    splits in their order, the labels, and the public examples of a basis.

    Raises DataError for whatever of that cannot be read or dealt.
    """
    digest = hashlib.sha256()
    for line in _lines(config):
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def _lines(config: RunConfig) -> Iterator[str]:
    yield json.dumps(list(labels_of(config)))
    splits: tuple[Split, ...] = ("train", config.evaluation.split)
    for split in splits:
        for name, part in zip(config.client_names, all_parts(config, split), strict=True):
            yield json.dumps([split, name, [_fields(example) for example in part]])
    if config.basis.public is not None:
        yield json.dumps(["public", [_fields(example) for example in public_examples(config)]])


def heard(example: Example) -> list[str]:
    """Of a recording what is in it, since its file's name says nothing of that."""
    return [example.speech.sha256()] if example.speech else []


def _fields(example: Example) -> list[str | int | None]:
    code = example.code
    told = [example.task, example.prompt, example.completion, example.answer, example.label]
    return told + ([code.language, code.tests, *code.stops] if code else []) + heard(example)
