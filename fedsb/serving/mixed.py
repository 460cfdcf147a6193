"""A base model whose linear layers add, for each row of a batch, the adapter of that row's tenant (`fedsb.serving.bank`)."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional

from fedsb.adapters.flora import batched
from fedsb.errors import AdapterError
from fedsb.models import HEADS
from fedsb.serving.bank import HEAD, Bank, Group, Use


class MixedLinear(nn.Module):
    """A linear layer of the base model, and what the batch's tenants add to it."""

    def __init__(self, base: nn.Linear, name: str, bank: Bank) -> None:
        super().__init__()
        self.base, self.name, self.bank = base, name, bank

    def forward(self, x: Tensor) -> Tensor:
        """x (n, …, in) → (n, …, out); packed (1, T, in) → (1, T, out). Raises ValueError if x has other rows than the batch."""
        y: Tensor = self.base(x)
        if self.bank.rows not in (0, len(x)):
            raise ValueError(f"layer {self.name} got {len(x)} rows in a batch of {self.bank.rows}; it must see row by row")
        for use in self.bank.batch:
            if self.name in use.group.views:
                y = self._packed(x, y, use) if self.bank.packed else self._by_row(x, y, use)
        return y

    def _by_row(self, x: Tensor, y: Tensor, use: Use) -> Tensor:
        if use.take is None:
            return y + self._added(x, use.group, use.slots)
        return y.index_add(0, use.take, self._added(x[use.take], use.group, use.slots))

    def _packed(self, x: Tensor, y: Tensor, use: Use) -> Tensor:
        if use.take is None:  # one token of each sequence
            return y + self._added(x.transpose(0, 1), use.group, use.slots).transpose(0, 1)
        added = self._added(x[0, use.take], use.group, use.slots)  # (k, L, out)
        return y.index_add(1, use.take.flatten(), added.flatten(0, 1)[None])

    def _added(self, x: Tensor, group: Group, slots: Tensor) -> Tensor:
        parts = group.views[self.name]
        if group.form == "core":
            shared = group.shared[self.name]
            return cores(x, shared.A, parts["core"][slots], shared.B)
        a, b = parts["A"][slots], parts["B"][slots]
        return factors(x, a, b) if group.form == "lora" else batched(x, self.base.weight, a, b.mT)


class MixedHead(nn.Module):
    """A classification head, of each row's tenant; of the base model for rows without one."""

    def __init__(self, base: nn.Linear, name: str, bank: Bank) -> None:
        super().__init__()
        self.base, self.name, self.bank = base, name, bank

    def forward(self, x: Tensor) -> Tensor:
        """x (n, …, d) → logits (n, …, classes)."""
        y: Tensor = self.base(x)
        for use in self.bank.batch:
            if HEAD + self.name not in use.group.views:
                continue
            parts = use.group.views[HEAD + self.name]
            weight, bias = parts["weight"][use.slots], parts["bias"][use.slots]
            h = (x if use.take is None else x[use.take]).to(weight.dtype)
            own = torch.bmm(h.reshape(len(h), -1, h.shape[-1]), weight.mT) + bias[:, None]
            own = own.view(*h.shape[:-1], -1).to(y.dtype)
            if use.take is None:
                y = torch.where((use.slots > 0).view(-1, *[1] * (y.ndim - 1)), own, y)
            else:
                y = y.index_copy(0, use.take, own)
        return y


def cores(x: Tensor, a: Tensor, r: Tensor, b: Tensor) -> Tensor:
    """B·R_i·A·x_i for each row i.

    Args:
        x: (n, …, in).
        a, b: (r, in) and (out, r), the same for all rows.
        r: (n, r, r), of each row.

    Returns (n, …, out) in x's dtype. Each core is read once, however many tokens its row has.
    """
    wide = torch.promote_types(x.dtype, a.dtype)
    h = functional.linear(x.to(wide), a.to(wide))  # (n, …, r)
    mixed = torch.bmm(h.reshape(len(h), -1, h.shape[-1]).to(r.dtype), r.mT)
    return functional.linear(mixed.view(h.shape).to(wide), b.to(wide)).to(x.dtype)


def factors(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """B_i·A_i·x_i for each row i: x (n, …, in), a (n, r, in), b (n, out, r) → (n, …, out) in x's dtype."""
    h = torch.bmm(x.reshape(len(x), -1, x.shape[-1]).to(a.dtype), a.mT)
    return torch.bmm(h, b.mT).view(*x.shape[:-1], -1).to(x.dtype)


def mix(model: Any, bank: Bank) -> Any:
    """Let a transformers model use a bank, in place: each linear layer but the output head of a language model. What PEFT has put
    around its layers is taken off.

    Raises AdapterError if a classifier's head is more than one linear layer.
    """
    output, done = model.get_output_embeddings(), "\0"
    for name, module in list(model.named_modules()):
        wrapped = isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)
        if module is output or name.startswith(done) or not (wrapped or isinstance(module, nn.Linear)):
            continue
        done = f"{name}."
        base = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
        base = base.get_base_layer() if isinstance(base, BaseTunerLayer) else base
        headed = name.partition(".")[0] in HEADS
        if not isinstance(base, nn.Linear) or (headed and "." in name):
            raise AdapterError(f"{name} of {type(model).__name__} is no single linear layer; score one tenant at a time")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, (MixedHead if headed else MixedLinear)(base, name, bank))
        if not headed:
            bank.layers[name] = base.out_features, base.in_features
    return model
