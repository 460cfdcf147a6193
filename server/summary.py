"""`summary.json`: what a run was, what it moved and what came out. Its keys are stable; see docs/design.md."""

import platform
from collections import Counter
from importlib.metadata import version
from typing import Any

from fedsb.adapters.instances import size_of
from fedsb.adapters.share import trained_size
from fedsb.basis.frames import Basis
from fedsb.privacy.accounting import epsilon
from fedsb.privacy.mechanism import basis_releases, delta_of, mechanism_of
from fedsb.report.provenance import code, machine, peak_memory
from fedsb.store.files import read_events
from fedsb.training.start import basis_source
from server.federation import Federation

PACKAGES = ("fedsb", "flwr", "torch", "transformers", "peft", "opacus", "numpy", "safetensors")


def summarise(run: Federation, basis: Basis, evaluation: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The summary of a finished run."""
    config, history, encoder = run.config, run.history, run.encoder
    replies = sum(entry["clients"] for entry in history)
    return {
        "model": {"name": run.source.name, "sha256": run.source.sha256},
        "encoder": None if encoder is None else {"name": encoder.name, "sha256": encoder.sha256, "parameters": size_of(encoder)},
        "method": config.adapter.method,
        "strategy": config.strategy.name,
        "rank": config.adapter.rank,
        "seed": config.seed,
        "clients": len(run.roster),
        "rounds": config.federation.rounds,
        "trainable_parameters": trained_size(run.trained, config.adapter.method),
        "basis": {"source": basis_source(config), "fingerprint": basis.fingerprint, "bytes": basis.nbytes},
        "bytes": {
            "basis": run.traffic.basis,
            "up": run.traffic.up,
            "down": run.traffic.down,
            "up_per_client_round": round(sum(entry["up"] for entry in history) / max(1, replies)),
        },
        "aggregation_error": max((e["aggregation_error"] for e in history if e["aggregation_error"] is not None), default=None),
        "history": history,
        "split": config.evaluation.split,
        "evaluation": evaluation,
        "privacy": _privacy(run),
        "seconds": {"total": round(seconds, 3), "rounds": [entry["seconds"] for entry in history]},
        "peak_memory": max(run.peak_memory, peak_memory()),
        "code": code(),
        "machine": machine(config.runtime.device),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }


def _privacy(run: Federation) -> dict[str, Any] | None:
    """What was promised, and the rounds that each client's reply counted in. What it has spent stands in its own ledger."""
    privacy, clients = run.config.privacy, run.config.federation.clients
    if privacy.unit == "none":
        return None
    promised: dict[str, Any] = {
        "epsilon": privacy.epsilon,
        "delta": None if privacy.delta == "auto" else privacy.delta,
        "accountant": None,
    }
    if privacy.unit == "client":  # the same for all, so the server knows it
        mechanism, delta = mechanism_of(run.config, clients), delta_of(run.config, clients)
        cost = epsilon([*basis_releases(run.config, clients), mechanism.release(len(run.history))], delta)
        promised = {"epsilon": cost.best, "delta": delta, "accountant": cost.accountant}
    counted = {(e["client"], e["round"]) for e in read_events(run.journal.path) if e["event"] == "reply"}
    return {"unit": privacy.unit, **promised, "clients": dict(Counter(client for client, _ in sorted(counted)))}
