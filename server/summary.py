"""`summary.json`: what a run was, what it moved and what came out. Its keys are stable; see docs/design.md."""

import platform
from importlib.metadata import version
from typing import Any

from fedsb.basis.frames import Basis
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
            "up_per_client_round": round(sum(entry["up"] for entry in history) / replies),
        },
        "aggregation_error": max(entry["aggregation_error"] for entry in history),
        "history": history,
        "evaluation": evaluation,
        "privacy": None,
        "seconds": {"total": round(seconds, 3), "rounds": [entry["seconds"] for entry in history]},
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }
