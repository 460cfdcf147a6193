"""The site decides: what is beyond its policy is refused with a reason, and the run goes on without it."""

import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import RecordDict

from clients.answers import answer
from clients.app import app as client_app
from clients.policy import Policy, load_policy, template
from fedsb.config import RunConfig
from fedsb.errors import BasisError, ConfigError, PolicyError, PrivacyError, ReplyError, SandboxError
from server.local_grid import LocalGrid, node_configs
from strategies.records import CONFIG, PREPARE, TRAIN, Order
from tests.federation.tiny import config_of, events, federate, personal_states, save_model, save_task, table


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("site")
    return config_of(table(save_model(folder / "model"), save_task(folder / "words")))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('methods = ["fedex-lora"]', r"adapter.method = lora-sb \(methods = \['fedex-lora'\]\)"),
        ('models = ["smollm2-*", "/models/*"]', r"model.source = .*model \(models = "),
        ('tasks = ["gym:*"]', r"data.tasks = jsonl:.*words \(tasks = "),
        ("tasks = []", r"data.tasks = jsonl:.*words \(tasks = \[\]\)"),
        ("max_rank = 3", r"adapter.rank = 4 \(max_rank = 3\)"),
        ("max_steps = 1", r"train.steps or personal.steps = 2 \(max_steps = 1\)"),
        ("max_rounds = 2", r"federation.rounds = 3 \(max_rounds = 2\)"),
    ],
)
def test_each_limit(config: RunConfig, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(PolicyError, match=f"the site's policy does not allow {said}"):
        load_policy(tmp_path / "policy.toml").check(config)


@pytest.mark.parametrize(
    ("text", "privacy", "said"),
    [
        ("max_epsilon = 3.0", {}, "allows no run without differential privacy"),
        ("max_epsilon = 3.0", {"unit": "client", "noise_multiplier": 1e6}, "allows only privacy by record"),
        ("secure_sum_only = true", {}, "does not allow privacy.secure_sum = false"),
    ],
)
def test_privacy_that_a_site_does_not_count_as_such(
    config: RunConfig, tmp_path: Path, text: str, privacy: dict[str, Any], said: str
) -> None:
    """The noise by client is the server's to add, and a server may promise what it likes."""
    content = json.loads(config.to_json()) | {"privacy": privacy}
    content["federation"]["weighting"] = "uniform"
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(PolicyError, match=said):
        load_policy(tmp_path / "policy.toml").check(config_of(content))


def test_a_refusal_of_a_private_run_tells_nothing_of_the_data(config: RunConfig, tmp_path: Path) -> None:
    """Not the fingerprint in a ledger's, not the number of records in a δ's; a run without privacy is told why."""
    content = json.loads(config.to_json()) | {"privacy": {"unit": "record", "epsilon": 1.0, "delta": 0.9}}
    content["federation"]["weighting"] = "uniform"
    node = {"name": "client-0", "partition-id": 0, "num-partitions": 3, "folder": str(tmp_path)}
    question = RecordDict({CONFIG: Order(config_of(content).to_json(), 0, "").record()})
    with pytest.raises(PrivacyError, match="is above 1/") as refused:
        answer(PREPARE, question, node)
    assert refused.value.outside == f"does not answer {PREPARE}; its own log says why"  # type: ignore[attr-defined]
    question = RecordDict({CONFIG: Order(config.to_json(), 1, "f" * 64).record()})
    with pytest.raises(BasisError) as plain:
        answer(TRAIN, question, node)
    assert not hasattr(plain.value, "outside")


def test_at_its_limits_everything_is_allowed(config: RunConfig) -> None:
    source = config.data.tasks[0].source
    Policy(methods=("lora-sb",), models=("*",), tasks=("gym:*", source), max_rank=4, max_steps=2, max_rounds=3).check(config)
    Policy().check(config)


def test_the_template_allows_everything_and_explains_every_setting(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(template())
    assert load_policy(path) == Policy()
    path.write_text("\n".join(line.removeprefix("#") for line in template().splitlines() if not line.startswith("# ")))
    assert all(getattr(load_policy(path), name) != field.default for name, field in Policy.model_fields.items())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_rnak = 3", "policy.toml: max_rnak is not a setting; did you mean max_rank?"),
        ('max_rank = "3"', "policy.toml: max_rank = '3' will not do"),
        ("max_rank = 0", "policy.toml: max_rank = 0 will not do"),
        ("max_rank", "policy.toml: is not valid TOML"),
        (None, "policy.toml: cannot be read .*; without the site's policy nothing is answered"),
    ],
)
def test_a_wrong_file(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_policy(tmp_path / "policy.toml")


def test_a_path_does_not_climb_out_of_a_pattern(config: RunConfig) -> None:
    policy, task = Policy(tasks=("jsonl:/data/*",)), config.data.tasks[0]
    for source, allowed in (("jsonl:/data/a", True), ("jsonl:/data/a..b", True), ("jsonl:/data/../home/x", False)):
        data = config.data.model_copy(update={"tasks": (task.model_copy(update={"source": source}),)})
        changed = config.model_copy(update={"data": data})
        if allowed:
            policy.check(changed)
        else:
            with pytest.raises(PolicyError):
                policy.check(changed)


def test_the_folder_of_own_data_is_matched_as_it_is_written(config: RunConfig) -> None:
    task = config.data.tasks[0]

    def check(source: str, *patterns: str) -> None:
        tasks = (task.model_copy(update={"source": source}),)
        data = config.data.model_copy(update={"tasks": tasks, "partition": "own"})
        Policy(tasks=patterns).check(config.model_copy(update={"data": data}))

    check("jsonl:/data/{client}", "jsonl:/data/*")
    check("jsonl:/data/{client}", "gym:*", "jsonl:/data/{client}")
    for source in ("jsonl:/data/../{client}", "jsonl:/data/{client}/..", "jsonl:/home/{client}", "jsonl:{client}"):
        with pytest.raises(PolicyError, match="the site's policy does not allow data.tasks = "):
            check(source, "jsonl:/data/*")


def test_a_server_does_not_go_on_beyond_the_rounds_that_were_agreed(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("max_rounds = 3\n")
    order = Order(config.to_json(), 4, "00" * 32)
    with pytest.raises(PolicyError, match="round 4 of a run of 3 rounds"):
        answer(TRAIN, RecordDict({CONFIG: order.record()}), {"policy": str(tmp_path / "policy.toml")})


def test_a_cap_on_epsilon_refuses_what_has_no_privacy(config: RunConfig) -> None:
    Policy().check(config)
    with pytest.raises(PolicyError, match=r"no run without differential privacy \(max_epsilon = 8.0\); this is one"):
        Policy(max_epsilon=8.0).check(config)


def test_a_server_of_another_version_is_not_answered(config: RunConfig) -> None:
    """Whatever else it asks: a model that is not there would be the next thing to fail."""
    order = Order(config.to_json(), 1, "00" * 32, versions="fedsb 7.3, flwr 1.41")
    with pytest.raises(ReplyError, match="where the server runs fedsb 7.3, flwr 1.41; install the server's version at the site"):
        answer(TRAIN, RecordDict({CONFIG: order.record()}), {})


class Sites(LocalGrid):
    """As over a network, an error of a client is a reply and not an exception."""

    def pull_messages(self, message_ids: Any) -> Any:
        from flwr.app import Error, Message

        for message_id in list(message_ids):
            message = self._pending.pop(message_id)
            try:
                yield self._app(message, self._contexts[message.metadata.dst_node_id])
            except Exception as error:
                yield Message(Error(2, str(error)), reply_to=message)


def _grid(config: RunConfig, out: Path, policy: Path) -> Sites:
    nodes = node_configs(config.client_names, str(out / "sites"))
    nodes[1]["policy"] = str(policy)
    return Sites(client_app, nodes)


def test_a_run_goes_on_without_the_site_that_refuses(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("max_rank = 3\n")
    out = tmp_path / "run"
    summary = federate(config, out, grid=_grid(config, out, tmp_path / "policy.toml"))
    refused = events(out, "refused")
    assert refused and all("the site's policy does not allow adapter.rank = 4 (max_rank = 3)" in e["reason"] for e in refused)
    assert summary["clients"] == 2 and personal_states(out).keys() == {"client-0", "client-2"}


def test_a_policy_that_changes_acts_at_once(config: RunConfig, tmp_path: Path) -> None:
    policy, out = tmp_path / "policy.toml", tmp_path / "run"
    policy.write_text("max_rounds = 3\n")
    grid = _grid(config, out, policy)
    asked = grid.push_messages

    def tighten(messages: Any) -> list[str]:
        outgoing = list(messages)
        if outgoing[0].metadata.group_id == "2":
            policy.write_text("max_rounds = 1\n")
        return asked(outgoing)

    grid.push_messages = tighten  # type: ignore[method-assign]
    summary = federate(config, out, grid=grid)
    assert [entry["clients"] for entry in summary["history"]] == [3, 2, 2]
    assert "client-1" not in personal_states(out)


def test_a_personal_adapter_that_may_not_leave_stays(config: RunConfig, tmp_path: Path) -> None:
    """It is scored where it is, everybody else's result is the same, and its numbers are in no message."""
    (tmp_path / "policy.toml").write_text("personal_adapter_may_leave = false\n")
    kept, free = tmp_path / "kept", tmp_path / "free"
    grid = _grid(config, kept, tmp_path / "policy.toml")
    summary = federate(config, kept, grid=grid)
    expected = federate(config, free)
    assert personal_states(kept).keys() == {"client-0", "client-2"}
    assert [event["client"] for event in events(kept, "kept")] == ["client-1"]
    assert not events(kept, "refused")
    assert summary["evaluation"] == expected["evaluation"]
    assert list((kept / "sites" / "client-1").glob("personal-*.safetensors"))
    assert summary["bytes"]["up"] < expected["bytes"]["up"]


def test_an_encoder_is_a_model_too(config: RunConfig) -> None:
    lopa = {"adapter": {"method": "lopa", "encoder": "/home/somebody/private", "tokens": 2, "hidden": 4}}
    asked = config_of({**json.loads(config.to_json()), **lopa, "basis": {}})
    with pytest.raises(PolicyError, match=r"adapter.encoder = /home/somebody/private \(models = "):
        Policy(models=(config.model.source,)).check(asked)
    Policy(models=(config.model.source, "/home/*")).check(asked)


def test_what_cannot_be_scored_is_said_before_anything_is_trained(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs, where there is no sandbox."""
    row = {"prompt": "red", "completion": "green", "language": "py", "tests": "blue", "stop_tokens": []}
    (tmp_path / "task").mkdir()
    for split in ("train", "test"):
        (tmp_path / "task" / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 3)
    source = {"tasks": [{"name": "code", "source": f"jsonl:{tmp_path / 'task'}"}]}
    asked = config_of({**json.loads(config.to_json()), "data": source})

    def nowhere() -> None:
        raise SandboxError("there is no sandbox")

    monkeypatch.setattr("fedsb.serving.languages.require_sandbox", nowhere)
    with pytest.raises(SandboxError, match="there is no sandbox"):
        federate(asked, tmp_path / "out")
    assert not list(tmp_path.glob("out/checkpoints/*"))
