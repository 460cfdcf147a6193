"""What `fedsb compare` refuses, before anything runs."""

from pathlib import Path

import pytest

from fedsb.config import RunConfig
from tests.cli.front_door import complaint

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--methods", "lora,lorra"], "lorra is neither a method nor one of compare.variants; did you mean lora?"),
        (["--methods", "xyzzy"], "xyzzy is neither a method nor one of compare.variants; there are lora-sb, "),
        (["--methods", "lora,lora"], "compare.methods has lora twice; name each once"),
        (["--set", "compare.methods=[]"], "no methods to compare; give --methods lora-sb,lora or set compare.methods"),
        (["--set", "compare.seeds=[]"], "no seeds to compare; give --seeds 0,1,2 or set compare.seeds"),
        (["--seeds", "0,one"], "--seeds 0,one: one is no whole number; write --seeds 0,1,2"),
        (["--seeds", "-1"], "--seeds -1: -1 is no whole number"),
        (["--seeds", "1,1"], "compare.seeds has 1 twice"),
        (["--set", "compare.rates=[1, 0]"], "compare.rates.1 = 0 will not do: input should be greater than 0"),
        (["--set", "compare.rates=[1, -1.0]"], "compare.rates.1 = -1.0 will not do"),
        (["--set", "compare.rates=[1, 1]"], "compare.rates has 1.0 twice"),
        (["--set", "compare.rates=[1, 2]", "--seeds", "100"], "compare.tuning_seed = 100 is one of the seeds"),
        (["--set", "compare.rate=[1]"], "compare.rate is not a setting; did you mean compare.rates?"),
        (["--set", "compare.rates=[1, 2]", "--set", "compare.validation=0.01"], "none is held out by data.validation = 0.01"),
        (
            ["--set", "data.validation=0.1"],
            "data.validation is set by `fedsb compare` itself, from compare.validation",
        ),
        (["--set", 'compare.variants={lora={"adapter.rank"=2}}'], "compare.variants.lora bears the name of a method"),
        (
            ["--methods", "x", "--set", "compare.variants={x={seed=3}}"],
            "compare.variants.x sets seed, which `fedsb compare`",
        ),
        (["--methods", "x", "--set", "compare.variants={x={train={step=3}}}"], "x: train.step is not a setting; did you mean"),
        (["--set", "basis.source=weights"], 'lora: adapter.method = "lora" has no basis for basis.source = "weights"'),
        (["--set", "adapter.rank=99"], "adapter.rank = 99 is larger than the smallest side"),
        (["--set", "federation.min_clients=9"], "lora-sb: federation.min_clients is larger than federation.clients; lower it"),
        (["--set", "federation.clients=90"], "examples cannot be dealt to 90 clients"),
        (["--set", "model.source=/nowhere/at/all"], "/nowhere/at/all"),
        (
            ["--set", "privacy={unit='record', epsilon=3.0}", "--set", "federation.weighting=uniform"],
            'lora-sb: privacy.scores = "withheld" leaves nothing to compare; set "plain"',
        ),
    ],
)
def test_a_mistake_is_told_before_anything_runs(
    comparison: Path, out: Path, ran: list[RunConfig], capsys: Capture, options: list[str], said: str
) -> None:
    assert said in complaint(capsys, "compare", str(comparison), "--out", str(out), *options)
    assert ran == [] and not out.exists()


def test_a_folder_of_something_else_is_left_alone(
    comparison: Path, run: Path, out: Path, ran: list[RunConfig], capsys: Capture
) -> None:
    command = ("compare", str(comparison), "--out")
    assert complaint(capsys, *command, str(run)) == f"{run} holds files that are no comparison; choose another --out"
    out.write_text("mine")
    assert complaint(capsys, *command, str(out)) == f"{out} is a file; choose another --out"
    assert ran == [] and out.read_text() == "mine" and not (run / "compare.toml").exists()
