"""What settings know of methods and strategies by name, against the tables of what these are."""

from typing import get_args

from fedsb import abilities
from fedsb.adapters.methods import METHODS
from fedsb.adapters.state import Layout
from fedsb.aggregation.factors import mean_of
from fedsb.aggregation.mean import Mean
from fedsb.aggregation.optimiser import OPTIMISERS
from fedsb.sections import StrategySection
from strategies.robust import Robust
from strategies.table import STRATEGIES


def test_methods_are_those_of_the_table() -> None:
    assert set(get_args(abilities.Method)) == set(METHODS)
    assert set(abilities.FOLDING) == {name for name, method in METHODS.items() if method.fold}
    framed = {name for name, method in METHODS.items() if method.start or (method.frames == ("B", "A") and not method.heads)}
    assert abilities.SOURCES.keys() == framed | set(abilities.FUSING)
    assert set(abilities.IN_TURN) == {name for name, method in METHODS.items() if method.in_turn}
    assert set(abilities.HEADED) == {name for name, method in METHODS.items() if method.heads}
    layout = Layout((("a.A", (2, 3)), ("a.B", (4, 2))))
    assert set(abilities.RANKED_LORA) == {name for name in METHODS if type(mean_of(name, layout)) is not Mean}


def test_a_scale_is_what_a_method_does_something_with() -> None:
    told = {"target_modules": ["q_proj"]}
    configs = {name: m.config(4, 12.0, told | ({"heads": 3} if m.heads else {})) for name, m in METHODS.items()}
    scaled = {name for name, config in configs.items() if 12 in (getattr(config, "lora_alpha", 0), getattr(config, "alpha", 0))}
    assert set(abilities.SCALED) == scaled | {"lora-xs"}, "whose scale is in its frame"


def test_strategies_are_those_of_the_table() -> None:
    assert set(get_args(StrategySection.model_fields["name"].annotation)) == set(STRATEGIES)
    assert set(abilities.ROBUST) == {name for name, kind in STRATEGIES.items() if issubclass(kind, Robust)}
    assert set(abilities.OPTIMISERS) == set(OPTIMISERS)
    assert {*abilities.MEANS, *abilities.WHOLE, *abilities.OPTIMISERS} == set(STRATEGIES)
    assert abilities.OWN_SETTINGS.keys() == StrategySection.model_fields.keys() - {"name"}
    assert {name for names in abilities.OWN_SETTINGS.values() for name in names} <= set(STRATEGIES)
