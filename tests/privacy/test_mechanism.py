"""What settings mean for a client: δ, rate, noise; and which are refused."""

import pytest

from fedsb.config import RunConfig
from fedsb.errors import ConfigError, PrivacyError
from fedsb.privacy.accounting import epsilon
from fedsb.privacy.mechanism import delta_of, mechanism_of, planned_steps
from tests.federation.tiny import config_of, table


def config(**privacy: object) -> RunConfig:
    federation = {"weighting": "uniform", "rounds": 5, "clients": 10, "fraction": 0.5}
    return config_of(table("model", "gym:x", privacy=privacy, federation=federation))  # 2 steps of 4 a round, 2 personal


def test_the_noise_is_the_least_that_keeps_the_whole_run_within_epsilon() -> None:
    run = config(unit="record", epsilon=2.0)
    found = mechanism_of(run, 400)
    assert (found.sample_rate, found.clip_norm, planned_steps(run)) == (4 / 400, 1.0, 5 * 2 + 2)
    assert 1.9 < epsilon([found.release(12)], 1 / 400).best <= 2.0


def test_for_clients_a_round_is_one_step_at_the_rate_of_sampling() -> None:
    run = config(unit="client", epsilon=3.0, clip_norm=0.25)
    found = mechanism_of(run, 10)
    assert (found.sample_rate, found.clip_norm, planned_steps(run)) == (0.5, 0.25, 5)
    assert 2.8 < epsilon([found.release(5)], 0.1).best <= 3.0


def test_a_noise_multiplier_is_taken_as_it_is() -> None:
    assert mechanism_of(config(unit="record", noise_multiplier=0.7), 100).noise_multiplier == 0.7


def test_a_client_with_fewer_records_than_a_batch_takes_them_all() -> None:
    assert mechanism_of(config(unit="record", noise_multiplier=0.7), 3).sample_rate == 1.0


def test_delta_is_one_over_the_number_at_the_most() -> None:
    assert delta_of(config(unit="record", epsilon=1.0), 500) == 1 / 500
    assert delta_of(config(unit="record", epsilon=1.0, delta=1e-5), 500) == 1e-5
    with pytest.raises(PrivacyError, match=r"privacy.delta = 0.01 is above 1/500, .* records here; lower it to 2.0e-03"):
        delta_of(config(unit="record", epsilon=1.0, delta=0.01), 500)


def test_without_a_unit_or_anybody_there_is_no_mechanism() -> None:
    with pytest.raises(PrivacyError, match="there is no mechanism"):
        mechanism_of(config(), 100)
    with pytest.raises(PrivacyError, match="there is no mechanism"):
        mechanism_of(config(unit="record", epsilon=1.0), 0)


@pytest.mark.parametrize(
    ("privacy", "said"),
    [
        ({"unit": "record"}, "needs privacy.epsilon or privacy.noise_multiplier, and not both"),
        ({"unit": "record", "epsilon": 1.0, "noise_multiplier": 1.0}, "and not both"),
        ({"epsilon": 1.0}, 'privacy.epsilon protects nothing with privacy.unit = "none"'),
        ({"unit": "record", "epsilon": 1.0, "clip_norm": 0.0}, "privacy.clip_norm"),
        ({"unit": "record", "epsilon": -1.0}, "privacy.epsilon"),
        ({"unit": "record", "epsilon": 1.0, "delta": 1.0}, "privacy.delta"),
        ({"unit": "site", "epsilon": 1.0}, "privacy.unit"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(privacy: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**privacy)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            {"tasks": [{"name": n, "source": s} for n, s in (("a", "jsonl:/d/x"), ("b", "jsonl:/d/./x"))]},
            "may not have one source",
        ),
        ({"partition": "own", "tasks": [{"name": "a", "source": "jsonl:/d/{client}", "train": 5}]}, "take no `train`"),
    ],
)
def test_data_in_which_a_record_counts_more_than_once_are_refused(data: dict[str, object], said: str) -> None:
    private = {"unit": "record", "epsilon": 1.0}
    with pytest.raises(ConfigError, match=said):
        config_of(table("model", "gym:x", privacy=private, federation={"weighting": "uniform"}, data=data))


def test_weights_and_oversampling_that_tell_of_private_things_are_refused() -> None:
    private = {"unit": "client", "epsilon": 1.0}
    with pytest.raises(ConfigError, match='needs federation.weighting = "uniform"'):
        config_of(table("model", "gym:x", privacy=private))
    federation = {"weighting": "uniform", "over_sample": 1.5, "fraction": 0.5}
    with pytest.raises(ConfigError, match="needs federation.over_sample = 1"):
        config_of(table("model", "gym:x", privacy=private, federation=federation))
