"""FedSB: fine-tune one language model across sites that cannot share their data.

For use without a federation: `from fedsb import LoraSbConfig`, then `peft.get_peft_model(model, LoraSbConfig(r=64))`; likewise
`LoraXsConfig`, `RavanConfig` and `BoneConfig`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsb.adapters.bone import BoneConfig
    from fedsb.adapters.tuner import LoraSbConfig, LoraXsConfig, RavanConfig, set_basis

__all__ = ["BoneConfig", "LoraSbConfig", "LoraXsConfig", "RavanConfig", "set_basis"]


def __getattr__(name: str) -> object:
    """Import on first use: most of the project's files need neither torch nor PEFT."""
    if name in __all__:
        from fedsb.adapters import bone, tuner

        return getattr(bone if name == "BoneConfig" else tuner, name)
    raise AttributeError(f"module 'fedsb' has no attribute {name!r}")
