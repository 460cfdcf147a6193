"""Numbers as people read them."""


def human_bytes(count: float) -> str:
    """Bytes with a decimal unit: 0 B, 3.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if round(count, 1) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_seconds(seconds: float) -> str:
    """Seconds below two minutes, minutes above: 4.2 s, 3 min 05 s."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
