"""Memory for adapters of the same shapes, a slot each."""

import mmap
import sys

import torch
from torch import Tensor

from fedsb.serving.forms import Shapes

NORESERVE = 0x4000 if sys.platform == "linux" else 0  # what is not written yet counts for nothing; Python names it from 3.13 on
FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE


class Pool:
    """Memory for adapters of the same shapes: (capacity, stride), a slot each. All numbers of an adapter lie in one slot, so that
    loading is one copy.

    On a CPU a slot takes memory once it is written, and gives it back when it is cleared.
    """

    def __init__(self, shapes: Shapes, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shapes, self.capacity = shapes, capacity
        sizes = [((layer, part), torch.Size(shape)) for layer, parts in shapes.items() for part, shape in parts.items()]
        self._places: dict[tuple[str, str], int] = {}
        size = 0
        for key, shape in sizes:
            self._places[key] = size
            size += shape.numel()
        page = mmap.PAGESIZE // dtype.itemsize
        self.stride = -(-size // page) * page  # whole pages, so that a slot's memory is its own
        self._memory: mmap.mmap | None = None
        if device.type == "cpu":
            self._memory = mmap.mmap(-1, capacity * self.stride * dtype.itemsize, FLAGS)
            self.numbers = torch.frombuffer(self._memory, dtype=dtype)
        else:
            self.numbers = torch.zeros(capacity * self.stride, dtype=dtype, device=device)

    def view(self, layer: str, part: str) -> Tensor:
        """One part of one layer in all slots: (capacity, *shape)."""
        shape = self.shapes[layer][part]
        inner = torch.empty(shape, device="meta").stride()
        return self.numbers.as_strided((self.capacity, *shape), (self.stride, *inner), self._places[layer, part])

    def write(self, slot: int, numbers: Tensor) -> None:
        """Put an adapter into a slot, by one copy; numbers: its parts one after another, in the order of the shapes."""
        self.numbers[slot * self.stride :][: len(numbers)].copy_(numbers)

    def clear(self, slot: int) -> None:
        """Make a slot zero again, and let its memory go."""
        begin, count = slot * self.stride, self.stride
        if self._memory is None:
            self.numbers[begin : begin + count] = 0
        else:
            size = self.numbers.element_size()
            self._memory.madvise(mmap.MADV_DONTNEED, begin * size, count * size)
