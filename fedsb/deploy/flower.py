"""Flower's own commands, asked for JSON: start and stop runs, admit and list nodes."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsb.deploy.home import CONNECTION, Home
from fedsb.deploy.quiet import QUIET
from fedsb.errors import DeployError

SECONDS = 120.0
LISTED_RUNS = 100  # a resumed run counts anew


@dataclass(frozen=True)
class Flower:
    """The server of a federation, as its operator reaches it; `seconds` is the longest that one command may take."""

    home: Home
    seconds: float = SECONDS

    def run(self, app: Path, values: Path) -> str:
        """Start a run of an app with the run configuration in a TOML file; returns its number."""
        return str(self._ask("run", str(app), CONNECTION, "--run-config", str(values))["run-id"])

    def stop(self, number: str) -> None:
        """Stop a run."""
        self._ask("stop", number, CONNECTION)

    def status(self, number: str) -> dict[str, Any]:
        """A run's entry: `status` is `finished:completed`, `running`, …"""
        runs = self._ask("ls", CONNECTION, "--run-id", number)["runs"]
        found: dict[str, Any] = runs[0]
        return found

    def runs(self) -> dict[str, dict[str, Any]]:
        """Number → entry, as `status` gives it, of the runs started last."""
        return {str(run["run-id"]): run for run in self._ask("ls", CONNECTION, "--limit", str(LISTED_RUNS))["runs"]}

    def log(self, number: str) -> str:
        """What the ServerApp has printed so far."""
        return self._call("log", number, CONNECTION, "--show").stdout

    def admit(self, key: Path, name: str) -> str:
        """Let a node with this public key in; returns its number.

        Raises DeployError also for a key that was admitted once and is no more: the server never takes it again.
        """
        try:
            return str(self._ask("supernode", "register", str(key), CONNECTION, "--name", name)["node-id"])
        except DeployError as error:
            if "already in use" not in str(error):
                raise
            raise DeployError(
                f"{key}: the server has had this key before (it was revoked, or its admission interrupted) and takes it no more; "
                "the site deletes its key and key.pub, makes new ones with `fedsb site init`, and sends the new NAME.pub"
            ) from None

    def expel(self, number: str) -> None:
        """Let a node in no longer."""
        self._ask("supernode", "unregister", number, CONNECTION)

    def nodes(self) -> dict[str, dict[str, Any]]:
        """Number → node, with `status` (online, offline, registered), `online-at` and `offline-at`."""
        return {str(node["node-id"]): node for node in self._ask("supernode", "list", CONNECTION)["nodes"]}

    def _environment(self) -> Mapping[str, str]:
        return os.environ | QUIET | {"FLWR_HOME": str(self.home.flower.resolve()), "PATH": search_path()}

    def _ask(self, *arguments: str) -> dict[str, Any]:
        done = self._call(*arguments, "--format", "json")
        start = done.stdout.find("{")
        try:
            answer: dict[str, Any] = json.JSONDecoder().raw_decode(done.stdout[start:])[0] if start >= 0 else {}
        except ValueError:
            answer = {}
        if not answer.get("success"):
            reason = str(answer.get("error-message") or done.stderr.strip() or done.stdout.strip() or "no answer")
            raise DeployError(f"the server refused `flwr {' '.join(arguments[:2])}` ({' '.join(reason.split())[:300]})")
        return answer

    def _call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [tool("flwr"), *arguments]
        try:
            return subprocess.run(
                command, env=self._environment(), capture_output=True, text=True, timeout=self.seconds, check=False
            )
        except subprocess.TimeoutExpired:
            raise DeployError(
                f"the server did not answer `flwr {arguments[0]}` within {self.seconds:.0f} s; see its log"
            ) from None


def tool(name: str) -> str:
    """A program of this Python environment, whether or not it is activated."""
    path = Path(sys.executable).parent / name
    return str(path) if path.exists() else name


def search_path() -> str:
    """PATH with this environment's programs first: Flower starts its own by name."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
