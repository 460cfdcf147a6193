"""The table of methods: the names that configurations use, and what each is made of."""

from dataclasses import dataclass

from peft import PeftConfig
from torch import nn

from fedsb.adapters.lora_sb import LoraSbConfig, LoraSbLinear


@dataclass(frozen=True)
class Method:
    """A way of adapting.

    Attributes:
        config: the PEFT configuration class.
        layer: the layer that takes the place of a linear layer.
        exact: whether the mean of the trained tensors is the mean of the weight updates.
    """

    config: type[PeftConfig]
    layer: type[nn.Module]
    exact: bool


METHODS: dict[str, Method] = {
    "lora-sb": Method(LoraSbConfig, LoraSbLinear, exact=True),
}
