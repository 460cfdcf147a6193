"""A base model whose linear layers add, for each row of a batch, the adapter of that row's tenant (`fedsb.serving.bank`)."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional

from fedsb.adapters.flora import batched
from fedsb.errors import AdapterError
from fedsb.models import HEADS
from fedsb.serving.bank import Bank, Stack, Use
from fedsb.serving.forms import HEAD
from fedsb.serving.prepacked import PrepackedLinear, can_prepack

SMALL = 500_000  # multiplications; below, oneDNN's fixed cost in bf16 is more than what it saves (docs/log.md)
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"))  # are given the same input


class Together:
    """Linear layers of the base model that are given the same input, and what the batch's tenants add to them: one product for
    all, where there are several. Their weights become parts of one, and go where that is prepacked. For inference only: there are
    no gradients.

    Args:
        layers: name → layer; several only if they are plain ones of the same inputs and dtype.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], bank: Bank) -> None:
        self.bank, self.names, self._layers = bank, tuple(layers), dict(layers)
        self.outs = [layer.out_features for layer in layers.values()]
        self._made: dict[str, tuple[Tensor, Tensor]] = {}  # layer → what it was given, and what it makes of it
        self._apart: dict[str, Together] = {}
        first, *more = layers.values()
        whole = _stacked([first, *more]) if more else first
        self._whole: nn.Module = whole
        if can_prepack(whole):
            self._whole, self._layers = PrepackedLinear(whole), {}
            for layer in layers.values():
                layer.weight = nn.Parameter(whole.weight.new_empty(0), requires_grad=False)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """x (n, …, in) → what that layer makes of it; packed (1, T, in) → (1, T, out)."""
        if self._apart:
            return self._apart[name](name, x)
        if len(self.names) == 1:
            return self._of(x, self._whole(x))
        given, made = self._made.pop(name, (None, None))
        if given is not None and given is not x:  # they are not given the same after all, as where one looks at an encoder
            self._apart, self._made = {each: Together({each: layer}, self.bank) for each, layer in self.plain.items()}, {}
            return self._apart[name](name, x)
        if made is None:
            found = self._of(x, self._whole(x)).split(self.outs, -1)
            self._made = {each: (x, y) for each, y in zip(self.names, found, strict=True)}
            made = self._made.pop(name)[1]
        return made

    @property
    def plain(self) -> dict[str, nn.Linear]:
        """The layers one by one, with plain weights: a copy, kept from then on, where they were prepacked."""
        if not self._layers:
            whole: Any = self._whole
            weights = whole.weight.split(self.outs)
            biases = [None] * len(weights) if whole.bias is None else whole.bias.split(self.outs)
            self._layers = {name: _linear(w, b) for name, w, b in zip(self.names, weights, biases, strict=True)}
        return self._layers

    def _of(self, x: Tensor, y: Tensor) -> Tensor:
        if self.bank.rows not in (0, len(x)):
            raise ValueError(f"layer {self.names[0]} got {len(x)} rows in a batch of {self.bank.rows}; it must see row by row")
        for use in self.bank.batch:
            if use.group.form != "core":
                y = self._factored(x, y, use)
            elif stack := use.group.stack(self.names, self.outs):
                y = self._cored(x, y, use, stack)
        return y

    def _cored(self, x: Tensor, y: Tensor, use: Use, stack: Stack) -> Tensor:
        tokens = self._chosen(x, use)
        a, _ = stack.wide(_width(x, tokens, stack.A))
        v = use.through(functional.linear(tokens.to(a.dtype), a).float(), stack.layers)
        _, b = stack.wide(_width(x, v, stack.B))
        if use.take is None and b.dtype == y.dtype:
            y.view(-1, y.shape[-1]).addmm_(v.to(b.dtype), b)
            return y
        return _added(y, v.to(b.dtype) @ b, use, self.bank.packed)

    def _factored(self, x: Tensor, y: Tensor, use: Use) -> Tensor:
        mine = [layer for layer in self.names if layer in use.group.views]
        if not mine:
            return y
        h = self._chosen(x, use)
        found = [
            _low_rank(h, use, layer, self) if layer in mine else h.new_zeros(len(h), out)
            for layer, out in zip(self.names, self.outs, strict=True)
        ]
        return _added(y, torch.cat(found, -1), use, self.bank.packed)

    def _chosen(self, x: Tensor, use: Use) -> Tensor:
        """Those tokens that use it: (m, in)."""
        rows = x[0] if self.bank.packed and use.take is not None else x
        return (rows if use.take is None else rows[use.take]).flatten(0, -2)


class MixedLinear(nn.Module):
    """One layer of several that are `Together`, or of one."""

    def __init__(self, together: Together, name: str) -> None:
        super().__init__()
        self.together, self.name = together, name

    def forward(self, x: Tensor) -> Tensor:
        """x (n, …, in) → (n, …, out); packed (1, T, in) → (1, T, out). Raises ValueError if x has other rows than the batch."""
        return self.together(self.name, x)


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


def _width(x: Tensor, rows: Tensor, side: Tensor) -> torch.dtype:
    """In what to multiply rows (m, k) with a side of a basis: as the model does, but small products in fp32, since bf16 has a
    cost for each of them on a CPU."""
    return torch.float32 if x.device.type == "cpu" and len(rows) * side.numel() <= SMALL else x.dtype


def factors(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """B_i·A_i·x_i for each row i: x (n, …, in), a (n, r, in), b (n, out, r) → (n, …, out) in x's dtype."""
    h = torch.bmm(x.reshape(len(x), -1, x.shape[-1]).to(a.dtype), a.mT)
    return torch.bmm(h, b.mT).view(*x.shape[:-1], -1).to(x.dtype)


def _low_rank(x: Tensor, use: Use, layer: str, base: Together) -> Tensor:
    """x (m, in) → (m, out): what plain low-rank updates and FLoRA add."""
    parts = use.group.views[layer]
    found = x.new_empty(len(x), base.outs[base.names.index(layer)])
    for span in use.spans:
        a, b = parts["A"][span.slots], parts["B"][span.slots]
        h = x.view(len(span.slots), -1, x.shape[-1]) if span.take is None else x[span.take]
        flora = use.group.form == "flora"
        added = (batched(h, partial(_product, base.plain[layer]), a, b.mT) if flora else factors(h, a, b)).flatten(0, 1)
        if span.take is None:
            return added
        found[span.take.flatten()] = added
    return found


def _added(y: Tensor, added: Tensor, use: Use, packed: bool) -> Tensor:
    """y, and what was made for the rows or tokens that use it (m, out)."""
    added = added.to(y.dtype)
    if use.take is None:
        return y + added.view(y.shape)
    return y.index_add(1, use.take, added[None]) if packed else y.index_add(0, use.take, added.view(-1, *y.shape[1:]))


def _product(layer: nn.Linear, x: Tensor) -> Tensor:
    """x (…, in) → (…, out), without the bias, whatever the weights are held in."""
    if type(layer) is nn.Linear:  # torchao's weights are tensors that know this product
        return functional.linear(x, layer.weight)
    y: Tensor = layer(x)
    return y if layer.bias is None else y - layer.bias


def _stacked(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One layer whose outputs are those of several, one after another; their weights become views of its."""
    outs, first = [layer.out_features for layer in layers], layers[0].weight
    bias = None
    if any(layer.bias is not None for layer in layers):
        none = [first.new_zeros(out) for out in outs]
        bias = torch.cat([zero if layer.bias is None else layer.bias.detach() for layer, zero in zip(layers, none, strict=True)])
    whole = _linear(torch.cat([layer.weight.detach() for layer in layers]), bias)
    for layer, weight in zip(layers, whole.weight.split(outs), strict=True):
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return whole


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def mix(model: Any, bank: Bank) -> Any:
    """Let a transformers model use a bank, in place: each linear layer but the output head of a language model. What PEFT has put
    around its layers is taken off.

    Raises AdapterError if a classifier's head is more than one linear layer.
    """
    output, done, plain = model.get_output_embeddings(), "\0", dict[str, nn.Linear]()
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
        if headed:
            _put(model, name, MixedHead(base, name, bank))
        else:
            plain[name] = base
            bank.layers[name] = base.out_features, base.in_features
    for names in _sets(plain):
        together = Together({name: plain[name] for name in names}, bank)
        for name in names:
            _put(model, name, MixedLinear(together, name))
    return model


def _put(model: Any, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _sets(layers: Mapping[str, nn.Linear]) -> list[tuple[str, ...]]:
    """Those that are given the same input, and can be one layer, together."""
    found: dict[object, list[str]] = {}
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        siblings = next((several for several in SIBLINGS if leaf in several), None)
        usual = siblings and type(layer) is nn.Linear and type(layer.weight.data) is Tensor  # and not quantised
        found.setdefault((parent, siblings, layer.in_features, layer.weight.dtype) if usual else name, []).append(name)
    return [tuple(names) for names in found.values()]
