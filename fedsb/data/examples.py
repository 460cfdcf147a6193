"""One example of a task, before any tokenizer has seen it."""

from dataclasses import dataclass

from fedsb.data.code import Code
from fedsb.data.speech import Speech


@dataclass(frozen=True, slots=True)
class Example:
    """A text to complete or to classify.

    Generation: trained on `completion`, scored against `answer`, and `label` is None.
    Classification: `prompt` is the text, `completion` and `answer` are empty, and `label` is a label id.
    Code: `prompt` is the beginning of a program as it stands, `completion` a reference (or empty), and `code` says how what comes
    after the prompt is tested.
    Speech: `prompt` names the file of a recording, which `speech` finds; `completion` and `answer` are its transcript.
    """

    task: str
    prompt: str
    completion: str
    answer: str
    label: int | None = None
    code: Code | None = None
    speech: Speech | None = None
