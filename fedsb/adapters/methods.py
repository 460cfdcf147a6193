"""The table of methods: the names that configurations use, and what each is made of."""

from fedsb.adapters.fedsa_lora import FEDSA_LORA
from fedsb.adapters.ffa_lora import FFA_LORA
from fedsb.adapters.lora import LORA
from fedsb.adapters.lora_sb import LORA_SB
from fedsb.adapters.method import Method
from fedsb.adapters.nested_sb import NESTED_SB
from fedsb.adapters.ranks_lora import FLEXLORA, HETLORA

METHODS: dict[str, Method] = {
    "lora-sb": LORA_SB,
    "lora": LORA,
    "ffa-lora": FFA_LORA,
    "nested-sb": NESTED_SB,
    "fedsa-lora": FEDSA_LORA,
    "hetlora": HETLORA,
    "flexlora": FLEXLORA,
}
