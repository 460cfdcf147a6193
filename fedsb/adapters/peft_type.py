"""The PEFT types of this project. Imported before anything that builds or loads one of its adapters.

PEFT keeps its types in an enumeration that only it may extend, so the members are added by hand. An unmodified PEFT does
not know the types and refuses our native files loudly, which is meant: it could not apply them.
"""

from peft.utils.peft_types import PeftType


def _extend_peft_types(name: str) -> PeftType:
    if name in PeftType.__members__:
        return PeftType(name)
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


FEDSB = _extend_peft_types("FEDSB")  # LoRA-SB
FEDSB_BONE = _extend_peft_types("FEDSB_BONE")
FEDSB_FLORA = _extend_peft_types("FEDSB_FLORA")
FEDSB_NOLA = _extend_peft_types("FEDSB_NOLA")
FEDSB_GALORE = _extend_peft_types("FEDSB_GALORE")
FEDSB_LOPA = _extend_peft_types("FEDSB_LOPA")
