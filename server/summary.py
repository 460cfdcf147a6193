"""`summary.json`: what a run was, what it moved and what came out. Its keys are stable; see docs/design.md."""

import platform
from collections import Counter
from importlib.metadata import version
from typing import Any

from fedsb.basis.frames import Basis
from fedsb.privacy.accounting import epsilon
from fedsb.privacy.mechanism import basis_releases, delta_of, mechanism_of
from fedsb.store.files import read_events
from server.federation import Federation

PACKAGES = ("fedsb", "flwr", "torch", "transformers", "peft", "safetensors")


def summarise(run: Federation, basis: Basis, evaluation: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The summary of a finished run."""
    config, history = run.config, run.history
    replies = sum(entry["clients"] for entry in history)
    return {
        "model": {"name": run.source.name, "sha256": run.source.sha256},
        "method": config.adapter.method,
        "rank": config.adapter.rank,
        "seed": config.seed,
        "clients": len(run.roster),
        "rounds": config.federation.rounds,
        "trainable_parameters": run.layout.size,
        "basis": {"source": config.basis.source, "fingerprint": basis.fingerprint, "bytes": basis.nbytes},
        "bytes": {
            "basis": run.traffic.basis,
            "up": run.traffic.up,
            "down": run.traffic.down,
            "up_per_client_round": round(sum(entry["up"] for entry in history) / max(1, replies)),
        },
        "aggregation_error": max((e["aggregation_error"] for e in history if e["aggregation_error"] is not None), default=None),
        "history": history,
        "evaluation": evaluation,
        "privacy": _privacy(run),
        "seconds": {"total": round(seconds, 3), "rounds": [entry["seconds"] for entry in history]},
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }


def _privacy(run: Federation) -> dict[str, Any] | None:
    """What was promised. What each client has spent stands in its own ledger."""
    privacy, clients = run.config.privacy, run.config.federation.clients
    if privacy.unit == "none":
        return None
    cost: dict[str, Any] = {"epsilon": privacy.epsilon, "delta": None if privacy.delta == "auto" else privacy.delta}
    if privacy.unit == "client":  # the same for all, so the server knows it
        delta = delta_of(run.config, clients)
        cost = {
            "epsilon": epsilon(
                [*basis_releases(run.config, clients), mechanism_of(run.config, clients).release(len(run.history))], delta
            ).best,
            "delta": delta,
        }
    asked = Counter(event["client"] for event in read_events(run.journal.path) if event["event"] == "reply")
    return {"unit": privacy.unit, **cost, "accountant": "prv", "clients": dict(asked)}
