"""A mixture of trained states, of which only the coefficients are trained: what a client with little data can afford.

    S_l = Σ_i c_{l,i}·S_{l,i}          for each tensor l of a state, S_{l,i} that of the i-th adapter of a pool

For LoRA-SB cores on one basis it is LoRAFusion's sum (`fedsb.adapters.lora_fusion`), Σ_i c_i·B·R_i·A = B·(Σ_i c_i·R_i)·A: again a
core, so it costs nothing to serve. A classification head is mixed alike. One number a tensor and adapter is trained, from the one
adapter that fits the client's examples best.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedsb.adapters.state import State, get_state, parameters_of
from fedsb.data.batches import Encoded, Kind
from fedsb.errors import AdapterError
from fedsb.training.loop import Plan, train


class Mixture(nn.Module):
    """Σ_i c_i·P_i in place of a tensor.

    Attributes:
        pool: P (N, …), fp32.
        c: (N,).
    """

    pool: Tensor

    def __init__(self, pool: Tensor, start: int) -> None:
        super().__init__()
        self.register_buffer("pool", pool)
        self.c = nn.Parameter(torch.zeros(len(pool), device=pool.device))
        with torch.no_grad():
            self.c[start] = 1

    def forward(self, instead: Tensor) -> Tensor:
        """The mixture; what stood there is not used."""
        mixture: Tensor = torch.tensordot(self.c, self.pool, 1)
        return mixture


@contextmanager
def mixed(model: nn.Module, pool: Sequence[Mapping[str, Tensor]], start: int) -> Iterator[dict[str, nn.Parameter]]:
    """While open, each trained tensor of a model is a mixture of those of the pool, at first the one of `start` alone; on
    leaving, it is what the mixture has become.

    Yields name of the tensor → c (N,). Raises AdapterError, and changes nothing, unless all have the model's names and shapes.
    """
    parameters = parameters_of(model)
    for state in pool:
        for name, parameter in parameters.items():
            if name not in state or state[name].shape != parameter.shape:
                raise AdapterError(f"{name} is not in all adapters of the pool, or of another shape; mix those of one run")
    owners = {id(p): (module, name) for module in model.modules() for name, p in module.named_parameters(recurse=False)}
    places = {name: owners[id(parameter)] for name, parameter in parameters.items()}
    mixtures = {}
    for name, (module, tensor) in places.items():
        mixtures[name] = Mixture(torch.stack([state[name] for state in pool]).to(parameters[name].device), start)
        parametrize.register_parametrization(module, tensor, mixtures[name])
    try:
        yield {name: mixture.c for name, mixture in mixtures.items()}
    finally:
        for module, tensor in places.values():
            parametrize.remove_parametrizations(module, tensor)


def fuse(
    model: Any,
    transformer: Any,
    pool: Sequence[Mapping[str, Tensor]],
    start: int,
    rows: Sequence[Encoded],
    plan: Plan,
    *,
    kind: Kind,
    pad_id: int,
    seed: int,
    client: str,
) -> tuple[State, dict[str, Tensor]]:
    """Train the mixture by the plan's steps; the state that it has become, and tensor → c (N,).

    Args:
        model: the PEFT model.
        transformer: the model in it.
        pool: states of one basis.
        start: the one to begin with.
        rows: the client's training examples.
    """
    with mixed(model, pool, start) as coefficients:
        # another name than the tensors': all learn at one rate, heads' too
        told = {f"mixture of {name}": c for name, c in coefficients.items()}
        train(transformer, told, rows, plan, kind=kind, pad_id=pad_id, seed=seed, client=client)
    return get_state(model), {name: c.detach().cpu() for name, c in coefficients.items()}
