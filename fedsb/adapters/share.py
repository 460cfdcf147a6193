"""A client's share: which numbers of a state travel between the server and that client.

A share is a layout of its own, made of a whole one: without the parts that a method leaves with each client (`Method.kept`),
and with every rank cut to the client's. A cut tensor is the leading block of the whole one, so a share's vector is some
entries of the whole vector, in the same order. The server's whole state is the share of a client of full rank. Of heads that
are trained in turn a share can have some alone.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from fedsb.adapters.method import Method
from fedsb.adapters.methods import METHODS
from fedsb.adapters.state import HEAD, Layout
from fedsb.errors import AdapterError


@dataclass(frozen=True)
class Share:
    """Some numbers of a state.

    Attributes:
        whole: the layout of the state.
        layout: of its names, and of each tensor's shape, as much as is in the share.
        first: of the tensors that are cut, the entry of their first axis with which the share begins.
    """

    whole: Layout
    layout: Layout
    first: int = 0

    @cached_property
    def index(self) -> Tensor | None:
        """Where the share's numbers stand in the whole vector (size of the share,), ascending; None: it is all of them."""
        if self.layout == self.whole:
            return None
        places = self.whole.unflatten(torch.arange(self.whole.size))
        of = dict(self.whole.shapes)
        blocks = [
            places[name][self.first if shape != of[name] else 0 :][tuple(map(slice, shape))] for name, shape in self.layout.shapes
        ]
        return torch.cat([block.reshape(-1) for block in blocks])

    def take(self, vector: Tensor) -> Tensor:
        """The share (size of the share,) of a whole vector; the vector itself if that is all."""
        return vector if self.index is None else vector[self.index]

    def put(self, part: Tensor, into: Tensor) -> Tensor:
        """A whole vector: `into` (size,), with the share's numbers replaced. Raises AdapterError for another size of `part`."""
        if part.shape != (self.layout.size,):
            raise AdapterError(
                f"a state of {self.layout.size} numbers was expected and {tuple(part.shape)} came; update both sides"
            )
        return part if self.index is None else into.index_copy(0, self.index, part.to(into.dtype))


@lru_cache(maxsize=256)
def share_of(whole: Layout, method: str, rank: int, *, kept: bool = False, up: bool = False) -> Share:
    """The share of a client of some rank in a state of a method; with `kept`, of all that it trains and publishes; with `up`,
    without what only goes down."""
    says = METHODS[method]
    left_out = () if kept else kept_names(whole, says)
    left_out += tuple(name for name, _ in whole.shapes if up and _part(name) in says.down)
    shapes = [(name, says.cut(_part(name), shape, rank)) for name, shape in whole.shapes if name not in left_out]
    return Share(whole, Layout(tuple(shapes)))


@lru_cache(maxsize=256)
def heads_of(whole: Layout, method: str, first: int, last: int) -> Share:
    """The share of heads `first` … `last` of a method that has them in turn, and of all that is in no head."""
    says = METHODS[method]

    def cut(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (last - first + 1, *shape[1:]) if says.parts.get(_part(name), "")[:1] == ("h",) else shape

    return Share(whole, Layout(tuple((name, cut(name, shape)) for name, shape in whole.shapes)), first)


def trained_size(whole: Layout, method: str) -> int:
    """How many numbers of a state learn at a time: all of them, or of heads in turn those of one."""
    if METHODS[method].down:
        return share_of(whole, method, whole.size, kept=True, up=True).layout.size  # a rank that cuts nothing
    return heads_of(whole, method, 0, 0).layout.size if METHODS[method].in_turn else whole.size


def kept_names(layout: Layout, method: Method) -> tuple[str, ...]:
    """The tensors of a state that stay with each client."""
    return tuple(name for name, _ in layout.shapes if _part(name) in method.kept)


def _part(name: str) -> str:
    """`core` of `….q_proj.core`; `head` of everything in a head."""
    return HEAD.rstrip(".") if name.startswith(HEAD) else name.rpartition(".")[2]
