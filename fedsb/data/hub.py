"""Rows of a data set on the Hugging Face hub."""

from collections.abc import Mapping
from typing import Any, Literal

from fedsb.data.rows import FORMS, Row, checked_row
from fedsb.errors import DataError


def read_hub(identity: str, name: str | None, split: Literal["train", "test"]) -> list[Row]:
    """All rows of one split of a hub data set; integer labels of a ClassLabel feature become their names.

    Raises DataError when `datasets` is missing, when the data set cannot be loaded, and for the first bad row.
    """
    data = _loaded(identity, name, split)
    class_names = getattr((data.features or {}).get("label"), "names", None)
    places = (f"hub:{identity}, {split} row {number}" for number in range(1, len(data) + 1))
    rows = [checked_row(_named(row, class_names, place), place) for row, place in zip(data, places, strict=True)]
    if not rows:
        raise DataError(f"hub:{identity}: its split {split} holds no rows; {FORMS}")
    return rows


def _loaded(identity: str, name: str | None, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(f"hub:{identity}: needs the package datasets; pip install datasets") from None
    try:
        return datasets.load_dataset(identity, name, split=split)
    except Exception as error:  # whatever the hub, the network or the data set's own script raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"hub:{identity}: its split {split} cannot be loaded ({reason}); check the id, options.name and "
            "the network, or save the data as a folder and name it with jsonl:"
        ) from error


def _named(row: Mapping[str, object], class_names: list[str] | None, place: str) -> Mapping[str, object]:
    label = row.get("label")
    if class_names is None or not isinstance(label, int):
        return row
    if not 0 <= label < len(class_names):
        raise DataError(f"{place}: label {label} has no name, so the split is not labelled; use a data set that is")
    return {**row, "label": class_names[label]}
