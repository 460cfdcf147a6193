import hashlib
import json
import math
import tomllib
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from fedsb.abilities import OWN_SETTINGS
from fedsb.config import RunConfig, read_table
from fedsb.errors import ConfigError
from fedsb.sections import CompareSection

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))
SMALL = """
name = "small"
[data]
tasks = [{ name = "words", source = "jsonl:words" }]
"""
FULL = """
name = "full"
[data]
[[data.tasks]]
name = "words"
source = "gym:words"
train = 5
test = 6
options = { a = 1, b = 2.5, c = "x", d = true }
[basis]
source = "public"
public = { name = "open", source = "jsonl:open", options = { e = 1 }, train = 3, test = 4 }
[data]
""".removesuffix("[data]\n")


def _file(folder: Path, text: str = SMALL) -> Path:
    path = folder / "a.toml"
    path.write_text(text)
    return path


def _small(folder: Path, *overrides: str) -> RunConfig:
    return RunConfig.load(_file(folder), overrides)


def _refused(folder: Path, *overrides: str, text: str = SMALL) -> str:
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(_file(folder, text), overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def _run_of(path: Path) -> tuple[RunConfig, CompareSection | None]:
    """A configuration, and the [compare] that `fedsb compare` takes off before."""
    table = read_table(path)
    compare = table.pop("compare", None)
    return RunConfig.model_validate(table), None if compare is None else CompareSection.model_validate(compare)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_configuration_parses_and_begins_with_its_command(path: Path) -> None:
    config, compare = _run_of(path)
    command = "compare" if compare else "run" if config.data.partition == "own" else "simulate"
    assert path.read_text().splitlines()[0] == f"# fedsb {command} {path.relative_to(ROOT)}"
    assert config.name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_configuration_holds_only_what_differs_from_the_defaults(path: Path) -> None:
    config, compare = _run_of(path)
    for section, values in tomllib.loads(path.read_text()).items():
        for key, value in values.items() if isinstance(values, dict) else ():
            field = type(compare if section == "compare" else getattr(config, section)).model_fields[key]
            assert field.is_required() or field.get_default(call_default_factory=True) != value, f"{section}.{key}"


def test_there_are_configurations() -> None:
    assert ROOT / "configs" / "quickstart.toml" in CONFIGS


def test_defaults_are_filled_in_and_nothing_can_be_changed(tmp_path: Path) -> None:
    config = _small(tmp_path)
    assert (config.federation.clients, config.adapter.rank, config.seed) == (4, 64, 0)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # type: ignore[misc]


def test_a_misspelt_key_is_named_with_a_near_one_and_its_file(tmp_path: Path) -> None:
    text = SMALL + "[train]\nlearnig_rate = 0.1\n"
    said = _refused(tmp_path, text=text)
    assert said == f"{tmp_path / 'a.toml'}: train.learnig_rate is not a setting; did you mean train.learning_rate?"
    assert "did you mean data.tasks.0.source?" in _refused(tmp_path, 'data.tasks=[{name="x", sorce="y"}]')
    assert "did you mean basis.public.source?" in _refused(tmp_path, 'basis.public={name="x", sorce="y"}')
    assert "did you mean federation?" in _refused(tmp_path, "federaton.clients=3")
    assert "docs/configuration.md lists them all" in _refused(tmp_path, "xyzzy=3")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("federation.clients=four", "federation.clients = 'four' will not do: input should be a valid integer"),
        ("federation.clients=4.0", "federation.clients = 4.0 will not do"),
        ("federation.clients=true", "federation.clients = True will not do"),
        ('seed="0"', "seed = '0' will not do"),
        ("seed=-1", "seed = -1 will not do: input should be greater than or equal to 0"),
        ("federation.fraction=0.0", "federation.fraction = 0.0 will not do"),
        ("data.alpha=nan", "data.alpha = nan will not do"),
        ("data.alpha=inf", "data.alpha = inf will not do: input should be a finite number"),
        ("basis.sign=1", "basis.sign = 1 will not do"),
        ("train.learning_rate=[1]", "train.learning_rate = [1] will not do: input should be a valid number or"),
        ("adapter.target_modules=[]", "adapter.target_modules = "),
        ("adapter.target_modules=q_proj", "adapter.target_modules = 'q_proj' will not do"),
        ("adapter.target_modules=[1]", "adapter.target_modules = [1] will not do"),
        ("name=Übung", "name = 'Übung' will not do"),
        ("name=../up", "name = '../up' will not do"),
        ("federation.names=[]", None),
        ("data.validation=1.0", "data.validation = 1.0 will not do: input should be less than 1"),
        ("compare.seeds=[1]", "compare is not a setting"),
        ("federation.over_sample=0.9", "federation.over_sample = 0.9 will not do"),
        ("federation.over_sample=inf", "federation.over_sample = inf will not do"),
        ("federation.max_update_norm=0", "federation.max_update_norm = 0 will not do"),
        ("federation.max_update_norm=none", "federation.max_update_norm = 'none' will not do"),
        ("federation.max_examples=0", "federation.max_examples = 0 will not do"),
        ("federation.strikes=-1", "federation.strikes = -1 will not do"),
        ("federation=3", "federation = 3 will not do"),
        ("data.tasks=[]", "data.tasks = [] will not do"),
        ("data.tasks=[{name = 'x'}]", "data.tasks.0.source is missing; set it"),
        ("data.tasks=[{name = 'x', source = 'y', options = {a = [1]}}]", "data.tasks.0.options.a = [1] will not do"),
        ("seed=2026-11-22", "seed = "),
    ],
)
def test_a_wrong_type_is_named(tmp_path: Path, override: str, said: str | None) -> None:
    if said is None:
        _small(tmp_path, override)
        return
    message = _refused(tmp_path, override)
    assert message.startswith(f"{tmp_path / 'a.toml'}: {said}") and "constrained" not in message


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (['federation.names=["a", "b"]'], "federation.names lists 2 names for 4 clients"),
        (['federation.names=["a", "b", "a", "c"]'], "federation.names has a name twice"),
        (["federation.min_clients=5"], "federation.min_clients is larger than federation.clients"),
        (["federation.over_sample=2.0"], "federation.over_sample has nobody more to ask where fraction = 1; lower"),
        (["basis.r0=paper"], 'basis.r0 = "paper" and basis.sign need'),
        (["basis.sign=true"], 'basis.r0 = "paper" and basis.sign need'),
        (["basis.source=public"], "set both or neither"),
        (['basis.public={name="x", source="y"}'], "set both or neither"),
        (['data.tasks=[{name="x", source="y"}, {name="x", source="z"}]'], "two tasks of one name"),
        (["data.partition=task", "federation.clients=1", 'data.tasks=[{name="x", source="y"}, {name="w", source="z"}]'], "at least as many clients"),  # noqa: E501
        (["model.kind=classification", 'data.tasks=[{name="x", source="y"}, {name="w", source="z"}]'], "classification takes one task"),  # noqa: E501
        (["data.partition=own", "model.kind=classification"], "needs data.labels; list the labels there"),
        (['data.labels=["a", "b"]'], "data.labels are those of a classifier"),
        (["model.kind=classification", 'data.labels=["a", "b", "a"]'], "data.labels has a label twice"),
        (["evaluation.split=validation"], 'evaluation.split = "validation" needs data.validation'),
        (["data.partition=own", "data.validation=0.1", "privacy.unit=record", "privacy.epsilon=3.0", "federation.weighting=uniform"], "with privacy a site's own data take no data.validation"),  # noqa: E501
        (['data.tasks=[{name="x", source="jsonl:data/{client}"}]'], '{client} in jsonl:data/{client} needs a folder as source and data.partition = "own"'),  # noqa: E501
        (["data.partition=own", 'data.tasks=[{name="x", source="hub:{client}/x"}]'], "{client} in hub:{client}/x needs a folder as source"),  # noqa: E501
        (["data.partition=own", "basis.source=public", 'basis.public={name="x", source="jsonl:{client}"}'], "basis.public.source has {client}, but the server alone reads it"),  # noqa: E501
    ],
)  # fmt: skip
def test_values_that_contradict_each_other(tmp_path: Path, overrides: list[str], said: str) -> None:
    message = _refused(tmp_path, *overrides)
    assert said in message and message.startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps", "--set train.steps: has no value; write --set section.key=value"),
        ("", "--set : has no value"),
        (" =3", "--set  =3: has no value"),
        ("name.deep=1", "--set name.deep=1: name is not a section"),
        ("data.tasks.name=1", "--set data.tasks.name=1: tasks is not a section"),
    ],
)
def test_a_bad_override(tmp_path: Path, override: str, said: str) -> None:
    assert _refused(tmp_path, override).startswith(said)


def test_own_data_takes_a_name_in_its_folder_and_any_number_of_clients(tmp_path: Path) -> None:
    own = ["data.partition=own", 'data.tasks=[{name="x", source="jsonl:data/{client}"}]']
    config = _small(tmp_path, *own, "federation.min_clients=9", "model.kind=classification", 'data.labels=["b", "a"]')
    assert config.data.tasks[0].source == "jsonl:data/{client}" and config.federation.clients < config.federation.min_clients
    assert config.data.labels == ("b", "a")
    assert "data.labels.1 = 3 will not do" in _refused(tmp_path, 'data.labels=["b", 3]')
    assert "data.labels.0 = '' will not do" in _refused(tmp_path, 'data.labels=[""]')


def test_overrides_are_toml_or_plain_words(tmp_path: Path) -> None:
    config = _small(
        tmp_path, "train.steps=7", "name=other", "train.learning_rate=2e-3", 'federation.names=["a", "b", "c", "d"]',
        "basis.source = weights", "data.system_prompt=", "train.schedule=constant", "train.steps=8",
    )  # fmt: skip
    assert (config.train.steps, config.name, config.train.learning_rate) == (8, "other", 2e-3)
    assert config.client_names == ("a", "b", "c", "d")
    assert (config.basis.source, config.data.system_prompt) == ("weights", "")


def test_clients_are_named_so_that_they_sort(tmp_path: Path) -> None:
    names = _small(tmp_path, "federation.clients=11").client_names
    assert names[:2] == ("client-00", "client-01") and list(names) == sorted(names)


@pytest.mark.parametrize("text", [SMALL, FULL])
def test_it_survives_json_and_toml(tmp_path: Path, text: str) -> None:
    config = RunConfig.load(_file(tmp_path, text))
    assert RunConfig.from_json(config.to_json()) == config
    assert RunConfig.load(_file(tmp_path, config.to_toml())) == config
    assert RunConfig.load(_file(tmp_path, config.to_toml())).digest() == config.digest()


@given(
    st.floats(min_value=1e-300, max_value=1e300),
    st.integers(0, 2**62),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
def test_any_number_and_text_survives(rate: float, seed: int, text: str) -> None:
    table = tomllib.loads(SMALL)
    table |= {"seed": seed, "train": {"learning_rate": rate}}
    table["data"]["system_prompt"] = text
    config = RunConfig.model_validate(table)
    assert RunConfig.from_json(config.to_json()) == config
    assert RunConfig.model_validate(tomllib.loads(config.to_toml())) == config
    assert math.isfinite(rate) and config.to_json().count("\n") == 0


def _leaves(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Paths of all values of a configuration."""
    if isinstance(value, BaseModel):
        return [leaf for name in type(value).model_fields for leaf in _leaves(getattr(value, name), (*path, name))]
    if isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
        return [leaf for i, item in enumerate(value) for leaf in _leaves(item, (*path, i))]
    return [path]


def _other(annotation: Any, value: Any) -> Any:
    """Another value of the same type, without regard to what is allowed."""
    if get_origin(annotation) is Annotated:
        return _other(get_args(annotation)[0], value)
    if get_origin(annotation) is Literal:
        return next((a for a in get_args(annotation) if a != value), "another")
    if get_origin(annotation) in (Union, UnionType):
        return _other(next(a for a in get_args(annotation) if a is not NoneType and get_args(a) != (value,)), value)
    changed: dict[type, Any] = {bool: not value, int: 77, float: 0.77, str: "another"}
    origin = get_origin(annotation) or annotation
    return {"z": 1} if origin is dict else ("another",) if origin is tuple else changed[origin]


def _changed(section: BaseModel, path: tuple[str | int, ...]) -> BaseModel:
    name, *rest = path
    value = getattr(section, str(name))
    if not rest:
        new = _other(type(section).model_fields[str(name)].annotation, value)
    elif isinstance(value, tuple):
        index = int(rest[0])
        new = (*value[:index], _changed(value[index], tuple(rest[1:])), *value[index + 1 :])
    else:
        new = _changed(value, tuple(rest))
    return section.model_copy(update={str(name): new})


CONFIG = RunConfig.model_validate(tomllib.loads(FULL))


@pytest.mark.parametrize("path", _leaves(CONFIG), ids=lambda path: ".".join(map(str, path)))
def test_the_digest_depends_on_everything_but_speed_patience_and_trackers(path: tuple[str | int, ...]) -> None:
    changed = _changed(CONFIG, path)
    assert isinstance(changed, RunConfig) and changed != CONFIG
    patience = ("wait_seconds", "round_seconds", "strikes")
    assert (changed.digest() == CONFIG.digest()) == (path[0] in ("runtime", "track") or path[-1] in patience)


def test_every_setting_has_a_description() -> None:
    for path in _leaves(CONFIG):
        section: Any = CONFIG
        for part in path[:-1]:
            section = section[part] if isinstance(part, int) else getattr(section, part)
        description = type(section).model_fields[str(path[-1])].description
        assert description and len(description) > 10, path


def test_a_later_version_with_more_settings_knows_a_run_again() -> None:
    class Later(RunConfig):
        more: int = 3

    table = CONFIG.model_dump(mode="json", exclude_none=True)
    assert Later.from_json(json.dumps(table)).digest() == CONFIG.digest()
    assert Later.from_json(json.dumps(table | {"more": 4})).digest() != CONFIG.digest()


def test_a_classification_from_before_heads_were_standardised_is_another_run() -> None:
    """The digest is what a run is resumed by; of causal runs nothing changed."""

    def written(config: RunConfig) -> str:
        content = config.model_dump(mode="json", exclude={"runtime", "track"}, exclude_defaults=True)
        return hashlib.sha256(json.dumps({k: v for k, v in content.items() if v != {}}, sort_keys=True).encode()).hexdigest()

    table: dict[str, Any] = {"name": "a", "data": {"tasks": [{"name": "words", "source": "jsonl:words"}]}}
    causal, labelled = (RunConfig.model_validate(table | {"model": {"kind": kind}}) for kind in ("causal", "classification"))
    assert causal.digest() == written(causal) and labelled.digest() != written(labelled)


@pytest.mark.parametrize("key", OWN_SETTINGS)
def test_a_setting_of_another_strategy_is_refused(key: str, tmp_path: Path) -> None:
    value = 0.3 if key in ("mu", "rate", "beta1", "beta2", "tau", "trim") else 3
    with pytest.raises(ConfigError, match=rf'strategy.{key} is of .*, and not of "fedavg"; drop it'):
        RunConfig.load(_file(tmp_path, FULL), [f"strategy.{key}={value}", 'strategy.name="fedavg"'])
