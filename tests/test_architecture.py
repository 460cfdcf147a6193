"""The floors of docs/design.md, read from the imports of every file: lower floors know nothing of the higher ones."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    [
        "fedsb.errors",
        "fedsb.abilities",
        "fedsb.validation",
        "fedsb.sections",
        "fedsb.adapter_section",
        "fedsb.settings",
        "fedsb.config",
    ],
    ["fedsb.models", "fedsb.quantisation", "fedsb.data", "fedsb.basis", "fedsb.privacy"],
    ["fedsb.adapters"],
    ["fedsb.aggregation", "fedsb.training", "fedsb.store", "fedsb.report"],
    ["fedsb.deploy", "fedsb.serving"],
    ["strategies"],
    ["clients", "server"],
    ["fedsb.cli"],
]
SAME_FLOOR = {
    ("fedsb.config", "fedsb.abilities"),
    ("fedsb.config", "fedsb.errors"),
    ("fedsb.config", "fedsb.settings"),
    ("fedsb.settings", "fedsb.abilities"),
    ("fedsb.settings", "fedsb.sections"),
    ("fedsb.settings", "fedsb.adapter_section"),
    ("fedsb.adapter_section", "fedsb.sections"),
    ("fedsb.adapter_section", "fedsb.abilities"),
    ("fedsb.config", "fedsb.validation"),
    ("fedsb.validation", "fedsb.errors"),
    ("fedsb.models", "fedsb.data"),
    ("fedsb.models", "fedsb.quantisation"),
    ("fedsb.report", "fedsb.store"),
}
FLWR = {"strategies", "clients", "server", "fedsb.cli"}
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "base", "core", "tools", "lib"}
LONGEST = 350
FOLDERS = ("fedsb", "strategies", "clients", "server")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
ROOMS = [room for floor in FLOORS for room in floor]


def module_of(path: Path) -> str:
    """`fedsb/store/files.py` → `fedsb.store.files`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def room_of(module: str) -> str | None:
    """The room that a module is in."""
    return next((room for room in ROOMS if module == room or module.startswith(f"{room}.")), None)


def floor_of(room: str) -> int:
    """The number of a room's floor, from below."""
    return next(number for number, floor in enumerate(FLOORS) if room in floor)


MODULES = {module_of(path): path for path in FILES if path.name != "__init__.py"}


def imports_of(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports anywhere; for `from a import b`, a.b if that is a module, else a."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in whole}
    return found


def test_every_file_is_in_a_room() -> None:
    lost = [name for name in MODULES if room_of(name) is None]
    assert not lost, f"give these a floor in FLOORS: {lost}"
    assert len(MODULES) > 40


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_only_lower_floors_or_its_own_folder(module: str) -> None:
    room = room_of(module)
    assert room is not None
    for imported in imports_of(MODULES[module]):
        if not imported.startswith(tuple(f"{folder}." for folder in FOLDERS)):
            assert imported not in FOLDERS, f"{module} imports the package {imported} and not a file of it"
            continue
        assert imported in MODULES, f"{module} imports {imported}, which is no file (a package's __init__?)"
        other = room_of(imported)
        assert other is not None
        allowed = other == room or floor_of(other) < floor_of(room) or (room, other) in SAME_FLOOR
        assert allowed, f"{module} (floor {floor_of(room)}) imports {imported} (floor {floor_of(other)})"


def test_there_are_no_circles() -> None:
    graph = {name: {i for i in imports_of(path) if i in MODULES} for name, path in MODULES.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, naming the circle


@pytest.mark.parametrize("module", MODULES)
def test_flwr_stays_in_its_rooms(module: str) -> None:
    if room_of(module) not in FLWR:
        assert not {name for name in imports_of(MODULES[module]) if name.split(".")[0] == "flwr"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_are_short_and_named_after_what_they_hold(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST
    assert path.stem not in VAGUE


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=str)
def test_packages_do_nothing_when_they_are_imported(path: Path) -> None:
    """Empty; `fedsb` itself may name what it offers, imported on first use."""
    if path != ROOT / "fedsb" / "__init__.py":
        assert not path.read_text().strip()
        return
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert isinstance(node, ast.ImportFrom) and node.module == "typing"


@pytest.mark.parametrize(("file", "maker"), [("server/app.py", "ServerApp"), ("clients/app.py", "ClientApp")])
def test_flower_finds_the_apps_as_plain_assignments(file: str, maker: str) -> None:
    """It reads the file without running it."""
    found = [
        ast.unparse(node.value)
        for node in ast.parse((ROOT / file).read_text()).body
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["app"]
    ]
    assert found == [f"{maker}()"]
    assert f'"{file.split("/")[0]}.app:app"' in (ROOT / "pyproject.toml").read_text()
