"""The table that a run ends with: client x {base, global, personal}."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from fedsb.report.units import human_bytes, human_seconds

KINDS = ("base", "global", "personal")
Evaluation = Mapping[str, Mapping[str, Mapping[str, Any]]]


def evaluation_table(evaluation: Evaluation, split: str = "test") -> Table:
    """`evaluation[kind][client]` → {loss, exact_match, n, task} as a table with the means in the last row; of recordings wer
    stands where exact match does."""
    spoken = any("wer" in score for score in evaluation["base"].values())
    table = Table(title=f"{'word error rate' if spoken else 'exact match'} and loss on each client's own {split} set")
    for column in ("client", "task", "n"):
        table.add_column(column, justify="right" if column == "n" else "left")
    for kind in KINDS:
        table.add_column(f"{kind}\n{'wer' if spoken else 'match'}", justify="right")
        table.add_column(f"{kind}\nloss", justify="right")
    clients = sorted(evaluation["base"])
    for client in clients:
        cells = [cell for kind in KINDS for cell in _cells(evaluation.get(kind, {}).get(client))]
        first = evaluation["base"][client]
        table.add_row(client, str(first["task"]), str(first["n"]), *cells)
    table.add_section()
    means = [cell for kind in KINDS for cell in _cells(mean_score(evaluation.get(kind, {})))]
    table.add_row("mean", "", "", *means)
    return table


def languages_table(evaluation: Evaluation) -> Table | None:
    """Programs' pass@1 or recordings' word error rate by language, over all clients; None if there are none of these."""
    told = [
        (language, kind, *counts)
        for kind, scores in evaluation.items()
        for score in scores.values()
        for language, counts in score.get("languages", {}).items()
    ]
    if not told:
        return None
    passed, tested = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for language, kind, right, of in told:
        passed[language, kind] += right
        tested[language, kind] += of
    title = "word error rate by language" if "wer" in next(iter(evaluation["base"].values())) else "pass@1 by language"
    table = Table("language", *(Column(heading, justify="right") for heading in ("n", *KINDS)), title=title)
    for language in sorted({language for language, *_ in told}):
        shares = [f"{passed[key] / tested[key]:.3f}" if tested[key := (language, kind)] else "-" for kind in KINDS]
        table.add_row(language, str(max(tested[language, kind] for kind in KINDS)), *shares)
    return table


def mean_score(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, float] | None:
    """Mean over clients, each counting alike; None of no clients."""
    if not scores:
        return None
    keys = [key for key in ("exact_match", "loss", "wer") if all(key in score for score in scores.values())]
    return {key: sum(float(s[key]) for s in scores.values()) / len(scores) for key in keys}


def show_summary(summary: Mapping[str, Any], adapters: str) -> None:
    """Print the table, the bytes moved and where the adapters lie."""
    console = Console(width=None if Console().is_terminal else 120)
    if summary["evaluation"]["base"]:
        console.print(evaluation_table(summary["evaluation"], summary["split"]))
    else:
        console.print('scores on the clients\' test sets are withheld (privacy.scores = "plain" has them told)', highlight=False)
    moved, seconds = summary["bytes"], summary["seconds"]
    console.print(
        f"moved: basis {human_bytes(moved['basis'])}, up {human_bytes(moved['up'])}, down {human_bytes(moved['down'])} "
        f"({human_bytes(moved['up_per_client_round'])} up per client and round)",
        highlight=False,
    )
    console.print(f"took {human_seconds(seconds['total'])}", highlight=False)
    console.print(f"personal adapters: {adapters}", highlight=False, soft_wrap=True)


def _cells(score: Mapping[str, Any] | None) -> tuple[str, str]:
    return ("-", "-") if score is None else (f"{score.get('wer', score['exact_match']):.3f}", f"{score['loss']:.3f}")
