"""The page of a run: from its events and its adapters, so also of one that is under way or has ended early."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from fedsb.config import RunConfig
from fedsb.errors import StoreError
from fedsb.privacy.accounting import epsilon
from fedsb.privacy.mechanism import basis_releases, delta_of, mechanism_of
from fedsb.report.charts import Line, bars, lines, matrix
from fedsb.report.cores import Cores, cores_of
from fedsb.report.page import Page, Part, State, table_of
from fedsb.report.tally import counting
from fedsb.report.units import human_bytes, human_seconds
from fedsb.store.files import read_events, read_json
from fedsb.store.ledger import NAME as LEDGER
from fedsb.store.ledger import Ledger
from fedsb.store.ledger import spent as spent_on

Events = Sequence[Mapping[str, Any]]
KINDS = ("base", "global", "personal")
MANY = 24  # clients, above which a chart has no line or bar for each


def run_page(folder: Path) -> Page:
    """Read a run's folder. Raises StoreError if it is none."""
    if not (folder / "config.toml").is_file():
        raise StoreError(f"{folder} is not a run folder (it has no config.toml); `fedsb simulate CONFIG` makes one")
    config, events = RunConfig.load(folder / "config.toml"), read_events(folder / "events.jsonl")
    rounds = {event["round"]: event for event in _of(events, "round")}  # of one done again after a resume, the later counts
    history, cores = [rounds[number] for number in sorted(rounds)], cores_of(folder / "adapters")
    scores = {kind: {e["client"]: e for e in _of(events, "scored") if e["which"] == kind} for kind in KINDS}
    state, verdict, because = _judged(config, events, history, scores, cores)
    start: Mapping[str, Any] = next(iter(_of(events, "start")), {})
    when = datetime.fromtimestamp(start["time"], UTC).strftime("%Y-%m-%d %H:%M UTC") if start else "not yet begun"
    return Page(
        f"FedSB: {config.name}",
        f"{config.adapter.method}, rank {config.adapter.rank}, {config.model.source}; {when}",
        state,
        verdict,
        because,
        _facts(config, history, scores, _moved(folder)),
        [part for part in _parts(folder, config, events, history, scores, cores) if part is not None],
    )


def _of(events: Events, kind: str) -> list[Mapping[str, Any]]:
    return [event for event in events if event["event"] == kind]


def _judged(
    config: RunConfig, events: Events, history: Events, scores: Mapping[str, Mapping[str, Any]], cores: Cores
) -> tuple[State, str, str]:
    """Whether it went well, and why."""
    ended, done, planned = bool(_of(events, "end")), len(history), config.federation.rounds
    losses = [event["loss"] for event in history if event["loss"] is not None]
    refused, silent = len(_of(events, "refused")), len(_of(events, "silent"))
    troubles = [
        f"{refused} replies were refused" if refused else "",
        f"{silent} times a client did not answer" if silent else "",
        f"adapters of {', '.join(cores.faults)} cannot be read" if cores.faults else "",
    ]
    base, best = _mean(scores["base"]), _mean(scores["personal"]) or _mean(scores["global"])
    gained = f"Exact match went from {base:.3f} to {best:.3f}." if base is not None and best is not None else ""
    told = " ".join(filter(None, [gained, _sentence(troubles)]))
    withheld = config.privacy.unit != "none" or config.privacy.secure_sum
    if not withheld and len(losses) < done:  # what is no number stands there as null
        return "bad", "It diverged.", f"The loss is no number any more; lower train.learning_rate. {told}"
    if not ended:
        return "fair", f"{done} of {planned} rounds are done.", f"It is under way, or was stopped. {told}"
    if len(losses) > 1 and losses[-1] >= losses[0]:
        return "bad", "It did not learn.", f"The loss went from {losses[0]:.3f} to {losses[-1]:.3f}. {told}"
    if base is not None and best is not None and best <= base:
        return "bad", "It did not help.", told
    return ("fair", "It learned, with losses on the way.", told) if any(troubles) else ("good", "It went well.", told)


def _sentence(texts: Sequence[str]) -> str:
    found = "; ".join(filter(None, texts))
    return f"{found[0].upper()}{found[1:]}." if found else ""


def _mean(scores: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Mean exact match over clients."""
    found = [score["exact_match"] for score in scores.values() if score.get("exact_match") is not None]
    return fmean(found) if found else None


def _moved(folder: Path) -> Mapping[str, int] | None:
    """All bytes that a run has moved, as its summary.json counts them, or up to its last checkpoint; None before the first."""
    for path in counting(folder):
        if path.exists():
            content = read_json(path)
            found: Mapping[str, int] = content.get("progress", content)["bytes"]
            return found
    return None


def _facts(
    config: RunConfig, history: Events, scores: Mapping[str, Mapping[str, Any]], moved: Mapping[str, int] | None
) -> list[tuple[str, str]]:
    facts = [("rounds", f"{len(history)} of {config.federation.rounds}")]
    if history and history[-1]["loss"] is not None:
        facts.append(("training loss", f"{history[-1]['loss']:.3f}"))
    for kind in KINDS:
        if (mean := _mean(scores[kind])) is not None:
            facts.append((f"exact match, {kind}", f"{mean:.3f}"))
    if moved:
        facts += [(name, human_bytes(moved[key])) for name, key in (("up", "up"), ("down", "down"), ("for the basis", "basis"))]
    errors = [event["aggregation_error"] for event in history if event["aggregation_error"] is not None]
    if errors:
        facts.append(("aggregation error", f"{max(errors):.1e}"))
    spent = _spent(config, history)
    if spent:
        facts.append((f"ε at δ = {delta_of(config, config.federation.clients):.1e}", f"{spent[-1][1]:.2f}"))
    return [*facts, ("rounds took", human_seconds(sum(event["seconds"] for event in history)))]


def _spent(config: RunConfig, history: Events) -> list[tuple[float, float]]:
    """Round → ε so far, where the server knows it: noise on what clients send. What records cost stands in sites' own ledgers."""
    if config.privacy.unit != "client":
        return []
    clients = config.federation.clients
    mechanism, delta, basis = mechanism_of(config, clients), delta_of(config, clients), basis_releases(config, clients)
    return [(event["round"], epsilon([*basis, mechanism.release(event["round"])], delta).best) for event in history]


def _privacy(folder: Path, config: RunConfig, history: Events) -> Part | None:
    """ε by round: of clients as the server knows it; of records by the ledgers of sites, which are here after a simulation."""
    if spent := _spent(config, history):
        return Part("Privacy spent", lines([Line("ε", spent, main=True)], "round", "ε", zero=True), "So far; it never goes down.")
    found = []
    for path in sorted(folder.glob(f"sites/*/{LEDGER}"))[:MANY]:
        entries = [entry for entry in Ledger(path, path.parent.name).entries() if entry.config == config.digest()]
        delta = 1 / max(2, *(entry.records for entry in entries)) if entries else 1.0
        rounds = sorted({entry.round for entry in entries})
        until = [(r, spent_on([entry for entry in entries if entry.round <= r], delta).best) for r in rounds]
        found.append(Line(path.parent.name, until, main=True))
    note = (
        "Of this run, by each site's own ledger, at δ of one over its records. 0 is the basis; the last has the personal adapter."
    )
    return Part("Privacy spent", lines(found, "round", "ε", zero=True), note) if found else None


def _parts(
    folder: Path, config: RunConfig, events: Events, history: Events, scores: Mapping[str, Mapping[str, Any]], cores: Cores
) -> list[Part | None]:
    return [
        _loss(events, history),
        _scores(scores),
        Part(
            "Bytes",
            lines(
                [Line(way, [(e["round"], e[way] / 1e6) for e in history], main=True) for way in ("up", "down")],
                "round",
                "MB",
                zero=True,
            ),
            "What all clients sent and were sent, round by round.",
        ),
        _privacy(folder, config, history),
        _alike(cores),
        _spectrum(cores),
        _norms(cores),
        _adapters(cores),
        _troubles(events),
    ]


def _loss(events: Events, history: Events) -> Part:
    replies = {(e["client"], e["round"]): e["loss"] for e in _of(events, "reply") if e.get("loss") is not None and e["round"]}
    clients = sorted({client for client, _ in replies})
    mean = Line("mean", [(e["round"], e["loss"]) for e in history if e["loss"] is not None], main=True)
    own = [
        Line(client, sorted((number, loss) for (name, number), loss in replies.items() if name == client))
        for client in (clients if len(clients) <= MANY else [])
    ]
    return Part("Training loss", lines([mean, *own], "round", "nats"), "A thick line for all, a thin one for each client.")


def _scores(scores: Mapping[str, Mapping[str, Any]]) -> Part | None:
    clients = sorted(set().union(*scores.values()))
    if not clients:
        return None
    rows = {
        client: {kind: of[client].get("exact_match") for kind, of in scores.items() if client in of} for client in clients[:MANY]
    }
    left = f" The first {MANY} of {len(clients)} clients." if len(clients) > MANY else ""
    return Part("Exact match on each client's own examples", bars(rows, most=1.0), f"The whole answer and nothing else.{left}")


def _alike(cores: Cores) -> Part | None:
    if not 1 < len(cores.alike) <= 4 * MANY:
        return None
    names = list(cores.stored)
    note = "Cosine of two clients' adapters: full colour is 1. Clients that are alike could share one."
    return Part("How alike the adapters are", matrix(names, names, cores.alike, 0.0, 1.0), note)


def _spectrum(cores: Cores) -> Part | None:
    if not cores.spectrum:
        return None
    series = [Line(name, list(enumerate(found, 1))) for name, found in list(cores.spectrum.items())[:MANY]]
    note = "Mean over layers. Where a line falls steeply, a lower rank would do."
    return Part("Singular values of the cores", lines(series, "number", "value", log_y=True), note)


def _norms(cores: Cores) -> Part | None:
    cells: dict[str, dict[int, float]] = {}
    for layer, norm in cores.norms.items():
        words = layer.split(".")
        number = next((int(word) for word in words if word.isdecimal()), 0)
        cells.setdefault(words[-1], {})[number] = norm
    if not cells:
        return None
    blocks = sorted(set().union(*cells.values()))
    rows = [[found.get(block, math.nan) for block in blocks] for found in cells.values()]
    body = matrix(list(cells), [f"block {block}" for block in blocks], rows, 0.0, max(cores.norms.values()))
    return Part(
        "Norms of what was trained", body, "By kind of layer and block, mean over clients: where the model changed.", wide=True
    )


def _adapters(cores: Cores) -> Part | None:
    if not cores.stored and not cores.faults:
        return None
    rows = list[Sequence[object]]()
    for client, each in cores.stored.items():
        m = each.manifest
        spent = "-" if m.epsilon is None else f"{m.epsilon:.2f}"
        size = human_bytes(sum(t.nbytes for t in each.state.values()))
        rows.append(
            (client, m.version, m.task, m.method, m.rank, f"{each.numbers.norm():.3g}", size, spent, m.sha256[:12], m.created)
        )
    rows += [(client, fault, *[""] * 8) for client, fault in cores.faults.items()]
    heads = ("client", "version", "task", "method", "rank", "norm", "size", "ε", "sha256", "published")
    return Part("Adapters", table_of(heads, rows), wide=True)


def _troubles(events: Events) -> Part | None:
    counts = Counter(
        (e["client"], e["event"], e.get("reason", "did not answer in time"))
        for e in events
        if e["event"] in ("refused", "silent")
    )
    if not counts:
        return None
    rows = [(client, kind, count, reason) for (client, kind, reason), count in counts.most_common()]
    return Part("What went wrong", table_of(("client", "what", "times", "why"), rows), wide=True)
