"""The table of methods: the names that configurations use, and what each is made of."""

from fedsb.adapters.bone import BONE, BONE_ROW
from fedsb.adapters.dylora import DYLORA
from fedsb.adapters.fedex_lora import FEDEX_LORA
from fedsb.adapters.fedsa_lora import FEDSA_LORA
from fedsb.adapters.ffa_lora import FFA_LORA
from fedsb.adapters.flora import FLORA, FLORA_ONES
from fedsb.adapters.flora_stacking import FLORA_STACKING
from fedsb.adapters.galore import GALORE
from fedsb.adapters.lopa import LOPA
from fedsb.adapters.lora import LORA
from fedsb.adapters.lora_fusion import LORAFUSION, LORAFUSION_PRODUCT
from fedsb.adapters.lora_ga import LORA_GA
from fedsb.adapters.lora_sb import LORA_SB
from fedsb.adapters.lora_xs import LORA_XS
from fedsb.adapters.method import Method
from fedsb.adapters.miss import MISS
from fedsb.adapters.nested_sb import NESTED_SB
from fedsb.adapters.nola import NOLA
from fedsb.adapters.ranks_lora import FLEXLORA, HETLORA
from fedsb.adapters.ravan import RAVAN
from fedsb.adapters.refreshed_sb import REFRESHED_SB

METHODS: dict[str, Method] = {
    "lora-sb": LORA_SB,
    "lora-xs": LORA_XS,
    "lora": LORA,
    "ffa-lora": FFA_LORA,
    "fedex-lora": FEDEX_LORA,
    "flora-stacking": FLORA_STACKING,
    "lora-ga": LORA_GA,
    "miss": MISS,
    "bone": BONE,
    "bone-row": BONE_ROW,
    "ravan": RAVAN,
    "dylora": DYLORA,
    "nested-sb": NESTED_SB,
    "refreshed-sb": REFRESHED_SB,
    "fedsa-lora": FEDSA_LORA,
    "hetlora": HETLORA,
    "flexlora": FLEXLORA,
    "flora": FLORA,
    "flora-ones": FLORA_ONES,
    "nola": NOLA,
    "galore": GALORE,
    "lopa": LOPA,
    "lorafusion": LORAFUSION,
    "lorafusion-product": LORAFUSION_PRODUCT,
}
