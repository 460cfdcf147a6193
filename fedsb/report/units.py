"""Numbers as people read them."""


def human_bytes(count: float) -> str:
    """Bytes with a decimal unit: 0 B, 3.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if round(count, 1) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_seconds(seconds: float) -> str:
    """Seconds below two minutes, minutes below two hours, hours above: 4.2 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def one_line(text: str, most: int = 500) -> str:
    """A text that somebody else may have written, fit for a line of a table, a terminal or a log: at most `most` characters
    and only printable ones, with each run of blanks as one."""
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text[: 2 * most].split()))
    return line if len(line) <= most else line[: most - 1] + "…"
