"""Where a run is also told of: TensorBoard, MLflow, Weights & Biases. Each is an extra, imported only when asked for.

They hear what `events.jsonl` says and nothing else. Each works in a thread of its own, so that a slow or dead one
never holds up a round; one that fails is named in `events.jsonl` (`untracked`) and told no more.

| figure | unit | step |
|---|---|---|
| `round/loss`, `round/aggregation_error`, `round/clients`, `round/seconds` | nats, relative, number, seconds | round |
| `bytes/up`, `bytes/down` | bytes of this round | round |
| `clients/NAME/loss` | nats, of its training | round |
| `scores/base/…`, `scores/global/…`, `scores/personal/…` | as in `summary.json`, mean over clients | last round |
| `clients/NAME/global/…` and so on | as in `summary.json` | last round |
"""

import os
import queue
import statistics
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fedsb.config import RunConfig
from fedsb.errors import ConfigError
from fedsb.report.units import one_line
from fedsb.sections import Tracker
from fedsb.store.files import read_json, write_json

KEPT = "trackers.json"  # in a run's folder: under which id a tracker knows the run, so that a resumed one goes on there
PATIENCE = 30.0  # seconds that the end of a run waits for what is still to be sent
OF_ROUND = ("loss", "aggregation_error", "clients", "seconds")


class Sink(Protocol):
    """One tracker: takes figures of a step, and is closed once."""

    def log(self, figures: Mapping[str, float], step: int) -> None: ...

    def close(self, *, finished: bool) -> None: ...


class TensorBoard:
    """Event files in `RUN/tensorboard`."""

    def __init__(self, config: RunConfig, folder: Path, kept: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.id = "tensorboard"  # the folder is the run's own
        self._writer = SummaryWriter(str(folder / self.id))  # type: ignore[no-untyped-call]
        if kept is None:
            self._writer.add_text("config", f"```toml\n{config.to_toml()}```")  # type: ignore[no-untyped-call]

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Write figures, and see to it that they are on disk."""
        for name, figure in figures.items():
            self._writer.add_scalar(name, figure, step)  # type: ignore[no-untyped-call]
        self._writer.flush()  # type: ignore[no-untyped-call]

    def close(self, *, finished: bool) -> None:
        """Close the file."""
        self._writer.close()  # type: ignore[no-untyped-call]


class MLflow:
    """A run of the experiment `track.project`, on the server that MLFLOW_TRACKING_URI names (by default `mlflow.db` here)."""

    def __init__(self, config: RunConfig, folder: Path, kept: str | None) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # of 7, which take minutes
        from mlflow import MlflowClient

        self._client = MlflowClient()
        if kept is not None:
            self.id = kept
            self._client.update_run(kept, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(config.track.project)
        experiment = found.experiment_id if found else self._client.create_experiment(config.track.project)
        self.id = self._client.create_run(experiment, run_name=config.name, tags={"fedsb.folder": str(folder)}).info.run_id
        for name, value in _flat(config.model_dump(mode="json", exclude_none=True)).items():
            self._client.log_param(self.id, name, value)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Send figures, each at once."""
        for name, figure in figures.items():
            self._client.log_metric(self.id, name, figure, step=step)

    def close(self, *, finished: bool) -> None:
        """Say how the run ended."""
        self._client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


class WandB:
    """A run of the project `track.project`; WANDB_MODE, WANDB_API_KEY and the like say where. Its files are in `RUN/wandb`."""

    def __init__(self, config: RunConfig, folder: Path, kept: str | None) -> None:
        import wandb

        settings = wandb.Settings(console="off", x_disable_stats=True, silent=True)
        self._run = wandb.init(
            project=config.track.project,
            name=config.name,
            id=kept,
            resume="allow" if kept else None,
            dir=folder,
            config=config.model_dump(mode="json", exclude_none=True),
            settings=settings,
        )
        self.id: str = self._run.id

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Hand figures to its process."""
        self._run.log(dict(figures), step=step)

    def close(self, *, finished: bool) -> None:
        """End the run there."""
        self._run.finish(exit_code=0 if finished else 1)


SINKS: dict[Tracker, type[TensorBoard] | type[MLflow] | type[WandB]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
}


class Tracking:
    """Turns a run's events into figures, and gives them to one tracker in a thread of its own.

    Attributes:
        name: of the tracker.
        failed: why it is told no more; "" while it works.
    """

    def __init__(self, name: str, sink: Sink) -> None:
        self.name, self.failed = name, ""
        self._sink = sink
        self._losses: dict[str, float] = {}
        self._scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._figures: dict[str, float] = {}
        self._round, self._finished = 0, False
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def show(self, event: Mapping[str, Any]) -> None:
        """Take an event in. Never raises and never waits."""
        match event["event"]:
            case "resumed":
                self._round = event["round"]
            case "reply" if event.get("loss") is not None:
                self._losses[event["client"]] = event["loss"]
            case "round":
                self._round = event["round"]
                figures = {f"round/{name}": event[name] for name in OF_ROUND if event[name] is not None}
                figures |= {f"bytes/{way}": event[way] for way in ("up", "down")}
                figures |= {f"clients/{client}/loss": loss for client, loss in self._losses.items()}
                self._losses = {}
                self._send(figures)
            case "scored":
                for name, value in event.items():
                    if isinstance(value, int | float) and name not in ("time", "n"):
                        self._figures[f"clients/{event['client']}/{event['which']}/{name}"] = value
                        self._scores[event["which"]][name].append(value)
            case "end":
                means = {f"scores/{w}/{n}": statistics.fmean(v) for w, found in self._scores.items() for n, v in found.items()}
                self._finished = True
                self._send(self._figures | means)

    def close(self) -> None:
        """Send what is left and close the tracker, for which a run waits `PATIENCE` seconds at the most."""
        self._queue.put(lambda: self._sink.close(finished=self._finished))
        self._queue.put(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive() and not self.failed:
            self.failed = f"took more than {PATIENCE:.0f} s for what was left"

    def _send(self, figures: Mapping[str, float]) -> None:
        step = self._round
        if figures:
            self._queue.put(lambda: self._sink.log(figures, step))

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                job()
            except Exception as error:  # whatever a tracker's library raises, it must not end a run; it is told in the journal
                self.failed = f"{type(error).__name__}: {one_line(str(error))}"
                return


def trackers(config: RunConfig, folder: Path) -> list[Tracking]:
    """Begin, or go on, with the trackers of `[track]`. Raises ConfigError for one that is not installed or does not begin."""
    path = folder / KEPT
    begun: list[Tracking] = []
    kept: dict[str, str] = read_json(path) if config.track.to and path.exists() else {}
    for name in config.track.to:
        try:
            sink = SINKS[name](config, folder, kept.get(name))
        except ImportError:
            message = f"track.to: {name} is not installed; pip install 'fedsb[{name}]', or leave it out"
            raise _stopped(begun, message) from None
        except Exception as error:  # of its library, or of the server that it speaks to
            message = (
                f"track.to: {name} does not begin ({type(error).__name__}: {one_line(str(error))}); mend it, or leave it out"
            )
            raise _stopped(begun, message) from error
        begun.append(Tracking(name, sink))
        kept[name] = sink.id
        write_json(path, kept)
    return begun


def _stopped(begun: list[Tracking], message: str) -> ConfigError:
    for tracking in begun:
        tracking.close()
    return ConfigError(message)


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A table of tables as `a.b.c` → value."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
