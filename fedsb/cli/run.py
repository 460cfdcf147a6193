"""`fedsb run`, `resume`, `status`, `logs`, `stop`: runs on a federation of real sites."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import typer
from rich.console import Console
from rich.table import Table

from fedsb.cli.options import Json, Quiet, say, told
from fedsb.cli.up import HOME, HomeOption
from fedsb.config import RunConfig
from fedsb.deploy import processes
from fedsb.deploy.flower import Flower
from fedsb.deploy.home import Home
from fedsb.deploy.sites import overview
from fedsb.errors import DeployError, FederationError, StoreError
from fedsb.report.screen import screen
from fedsb.report.table import show_summary
from fedsb.store.files import read_events, write_file
from server.run_folder import at_work

POLL_SECONDS = 0.5
ASK_SECONDS = 5.0  # between two looks at whether the run is still alive
STARTING_SECONDS = 15.0  # longest that a ServerApp takes from its start to its run's folder
AWAY_SECONDS = 120.0  # longest that the server may be away while a run is shown
ENDED = "finished"
Name = Annotated[str, typer.Argument(help="name of a run; by default the one started last")]


def run(
    config: Annotated[Path, typer.Argument(help="TOML file of the run")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="override a setting; may be repeated")
    ] = None,
    home: HomeOption = HOME,
    detach: Annotated[bool, typer.Option("--detach", help="return as soon as it is started")] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a federation on its sites, show its progress, and end with the table of `fedsb simulate`."""
    chosen = RunConfig.load(config, set_ or [])
    place = running(home)
    with place.turn():
        if (place.runs / chosen.name).exists():
            raise StoreError(
                f"{place.runs / chosen.name} holds a run already; `fedsb resume {chosen.name}` goes on with it, "
                "--set name=ANOTHER starts another"
            )
        _start(place, chosen, resume=False)
    if not detach:
        _follow(place, told(chosen, json_, quiet), json_=json_)


def resume(
    name: Name = "",
    home: HomeOption = HOME,
    detach: Annotated[bool, typer.Option("--detach", help="return as soon as it is started")] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Go on with a run from its last finished round; also one whose ServerApp was killed, before the server has noticed."""
    place = running(home)
    name = name or _last(place)
    path = place.runs / name / "config.toml"
    if not path.exists():
        raise StoreError(f"{place.runs / name} is no run; `fedsb status --home {home}` names those that there are")
    with place.turn():
        chosen, before = RunConfig.load(path), len(read_events(place.runs / name / "events.jsonl"))
        _bury(place, name)
        _start(place, chosen, resume=True)
    if not detach:
        _follow(place, told(chosen, json_, quiet), before, json_=json_)


def stop(name: Name = "", home: HomeOption = HOME) -> None:
    """Stop a run; its finished rounds stay, and `fedsb resume` goes on with it."""
    place = running(home)
    name = name or _last(place)
    Flower(place).stop(_number(place, name))
    print(f"{name}: stopped; `fedsb resume {name}` goes on from its last finished round")


def logs(name: Name = "", home: HomeOption = HOME) -> None:
    """Print what the server's side of a run has printed, and its events."""
    place = running(home)
    name = name or _last(place)
    print(Flower(place).log(_number(place, name)), end="")
    for event in read_events(place.runs / name / "events.jsonl"):
        print(json.dumps(event))


def status(
    home: HomeOption = HOME,
    json_: Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")] = False,
) -> None:
    """Show the sites and when they were last seen, and every run: state, round, bytes, replies refused."""
    place = running(home)
    found: dict[str, Any] = {
        "processes": {} if place.elsewhere else processes.states(place),
        "sites": overview(place),
        "runs": _runs(place),
    }
    if json_:
        print(json.dumps(found))
        return
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table_of("sites", found["sites"]))
    console.print(table_of("runs", found["runs"]))


def table_of(title: str, rows: Sequence[Mapping[str, Any]]) -> Table | str:
    """Rows with the same keys as a table for people."""
    table = Table(title=title, title_justify="left")
    for column in rows[0] if rows else []:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*map(str, row.values()))
    return table if rows else f"no {title} yet"


def running(home: Path) -> Home:
    """The federation in a folder. Raises DeployError if there is none, or if it was started here and is down."""
    place = Home(home)
    if place.elsewhere:
        return place
    place.topology()
    if processes.running(place) is None:
        raise DeployError(f"{home}: the federation is down; start it with `fedsb up` and the same names")
    return place


def _runs(place: Home) -> list[dict[str, Any]]:
    states, found = Flower(place).runs(), []
    for name, number in place.started().items():
        events = read_events(place.runs / name / "events.jsonl")
        rounds = [event for event in events if event["event"] == "round"]
        last = rounds[-1] if rounds else {}
        found.append(
            {
                "run": name,
                "status": states.get(number, {}).get("status", "unknown"),
                "round": f"{last.get('round', 0)}/{last['rounds']}" if rounds else "0",
                "loss": None if last.get("loss") is None else round(last["loss"], 4),
                "bytes_up": sum(event["up"] for event in rounds),
                "bytes_down": sum(event["down"] for event in rounds),
                "refused": sum(event["event"] == "refused" for event in events),
            }
        )
    return found


def _start(place: Home, chosen: RunConfig, *, resume: bool) -> None:
    """Start a run, in the turn of this command. Raises DeployError if it is under way, begun perhaps a moment ago."""
    number = place.started().get(chosen.name)
    if number and _running(Flower(place), number):
        raise DeployError(
            f"{chosen.name} is still running; `fedsb logs {chosen.name}` shows it, `fedsb stop {chosen.name}` ends it"
        )
    folder = (place.runs / chosen.name).resolve()
    values = place.folder / "values" / f"{chosen.name}.toml"
    content = {"config": chosen.to_json(), "out": str(folder), "home": str(place.folder.resolve()), "resume": resume}
    write_file(values, tomli_w.dumps(content).encode())
    number = Flower(place).run(place.write_app(), values)
    before = {name: other for name, other in place.started().items() if name != chosen.name}
    place.write_started(before | {chosen.name: number})


def _bury(place: Home, name: str) -> None:
    """Stop a run that the server takes for running although no process is at work on it: it notices only after minutes."""
    number = place.started().get(name)
    while number and not at_work(place.runs / name):
        entry = _running(Flower(place), number)
        if entry is None:
            return
        if float(entry["elapsed"]) > STARTING_SECONDS:
            Flower(place).stop(number)
            print(f"{name}: its ServerApp is gone; stopped", file=sys.stderr)
            return
        time.sleep(POLL_SECONDS)


def _running(flower: Flower, number: str) -> dict[str, Any] | None:
    """A run's entry at the server; None if it has ended, or the server's database is a new one."""
    entry = flower.runs().get(number)
    return None if entry is None or str(entry["status"]).startswith(ENDED) else entry


def _follow(place: Home, chosen: RunConfig, shown: int = 0, *, json_: bool = False) -> None:
    """Show a run's events as they come, from number `shown` on. Raises FederationError with what the server said, if it fails."""
    folder, number, flower = place.runs / chosen.name, place.started()[chosen.name], Flower(place)
    show, asked = screen(chosen.runtime.progress), time.monotonic()
    try:
        while True:
            shown = _show_new(show, folder, shown)
            if (folder / "summary.json").exists() or time.monotonic() - asked > ASK_SECONDS:
                state, asked = _state(flower, number), time.monotonic()
                if state.startswith(ENDED):
                    break
            time.sleep(POLL_SECONDS)
        _show_new(show, folder, shown)
    except KeyboardInterrupt:
        print(f"fedsb: {chosen.name} goes on without this terminal; `fedsb stop {chosen.name}` ends it", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        show.close()
    if state != f"{ENDED}:completed":
        again = f", and `fedsb resume {chosen.name}` goes on from its last finished round" if folder.exists() else ""
        why = _reason(flower.log(number), state)
        raise FederationError(f"{chosen.name}: {why}; `fedsb logs {chosen.name}` shows everything{again}")
    summary = json.loads((folder / "summary.json").read_text())
    if json_:
        say("summary", {"folder": str(folder), **summary})
    else:
        show_summary(summary, str(folder / "adapters"))


def _state(flower: Flower, number: str) -> str:
    """A run's state at Flower; a server that is being started anew is waited for. Raises DeployError if it stays away."""
    deadline = time.monotonic() + AWAY_SECONDS
    while True:
        try:
            return str(flower.status(number)["status"])
        except DeployError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)


def _show_new(show: Any, folder: Path, shown: int) -> int:
    events = read_events(folder / "events.jsonl")
    for event in events[shown:]:
        show.show(event)
    return len(events)


def _reason(log: str, state: str) -> str:
    """The last error of ours in a log, which is one sentence; else the run's state."""
    lines = [line.split(": ", 1)[1] for line in log.splitlines() if line.startswith("fedsb.errors.") and ": " in line]
    return lines[-1] if lines else state


def _last(place: Home) -> str:
    names = list(place.started())
    if not names:
        raise DeployError(f"{place.folder}: no run was started here yet; `fedsb run CONFIG --home {place.folder}` starts one")
    return names[-1]


def _number(place: Home, name: str) -> str:
    started = place.started()
    if name not in started:
        raise DeployError(f"{name} was not started here; the runs of {place.folder} are {', '.join(started) or 'none yet'}")
    return started[name]
