"""Two rounds on the real model, as `fedsb simulate` runs them: the weights of a package, real tasks, everything published."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from fedsb.adapters.state import parameters_of
from fedsb.adapters.tuner import LoraSbConfig
from fedsb.cli.evaluate import evaluate_run
from fedsb.config import RunConfig
from fedsb.models import load_model, locate
from fedsb.sections import ModelSection
from fedsb.store import adapters
from fedsb.store.basis_files import load_basis
from fedsb.store.export import export_lora
from fedsb.training.private import check_gradients
from tests.federation.tiny import config_of, equal, federate, final_state, personal_states

SMOLLM2 = "smollm2-135m-instruct"
TASKS = [
    {"name": "families", "source": "gym:family_relationships", "train": 32, "test": 6},
    {"name": "sums", "source": "gym:chain_sum", "options": {"min_terms": 2, "max_terms": 2}, "train": 32, "test": 6},
]


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return config_of(
        {
            "name": "real",
            "model": {"dtype": "fp32"},
            "data": {"partition": "task", "tasks": TASKS, "system_prompt": ""},
            "adapter": {"rank": 16},
            "train": {"steps": 2, "batch_size": 4, "microbatch": 4, "warmup_steps": 0},
            "federation": {"clients": 2, "names": ["archive", "bank"], "rounds": 2},
            "personal": {"steps": 1},
            "runtime": {"progress": "none", "threads": 1},
        }
    )


@pytest.fixture(scope="module")
def run(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "run"
    federate(config, folder)
    return folder


def test_two_rounds_lower_the_loss_of_every_client(run: Path) -> None:
    scores = evaluate_run(run)
    for client in ("archive", "bank"):
        base, shared, own = (scores[which][client]["loss"] for which in ("base", "global", "personal"))
        assert shared < base - 0.2 and own < base - 0.2
        assert own != shared


def test_personal_adapters_differ_and_load_in_an_unmodified_peft(config: RunConfig, run: Path, tmp_path: Path) -> None:
    states = personal_states(run)
    assert states.keys() == {"archive", "bank"}
    assert not equal(states["archive"], states["bank"]) and not equal(states["bank"], final_state(run))
    stored = adapters.load(run / "adapters", "bank")
    export_lora(stored, load_basis(run, stored.manifest.basis_fingerprint), tmp_path / "bank")
    base = load_model(locate(config.model.source), config.model, None, torch.device("cpu"))
    ids = torch.tensor([[1, 4093, 198, 1780, 314, 216, 24]])
    with torch.no_grad():
        before = base(input_ids=ids).logits
        after = PeftModel.from_pretrained(base, tmp_path / "bank")(input_ids=ids).logits
    assert (after - before).abs().max() > 0.1


def test_thirty_layers_in_bf16_pass_the_check_of_single_records() -> None:
    """Rounded in bf16 they would differ by up to 8 % between a batch and each record alone; weights are left as they were."""
    base = load_model(locate(SMOLLM2), ModelSection(dtype="bf16"), None, torch.device("cpu"))
    model = get_peft_model(base, LoraSbConfig(r=16, basis_dtype="bf16"))
    before = {name: t.data_ptr() for name, t in (*model.named_parameters(), *model.named_buffers())}
    check_gradients(model.get_base_model(), parameters_of(model), "causal", 0)
    assert {name: t.data_ptr() for name, t in (*model.named_parameters(), *model.named_buffers())} == before
    assert {t.dtype for name, t in model.named_parameters() if "core" not in name} == {torch.bfloat16}
