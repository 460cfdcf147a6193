"""Charts as inline SVG, in the page's own colours: nothing to install, nothing to load, readable in light and dark."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 520, 240, 56, 34, 20, 12
HUES = 8  # as many as the style sheet has colours
TICKS = 4


@dataclass(frozen=True)
class Line:
    """A named series. main: drawn thick, on top. band: (x, lowest, highest) around it. soft: grey, and not in the legend."""

    name: str
    points: Sequence[tuple[float, float]]
    main: bool = False
    band: Sequence[tuple[float, float, float]] = ()
    soft: bool = False


def lines(series: Sequence[Line], x: str, y: str, *, log_y: bool = False, zero: bool = False) -> Markup:
    """Series over a common x; what is not finite (or not positive on a logarithmic axis) is left out. `x`, `y` name the axes.

    zero: whether the axis of y begins there.
    """
    kept = [Line(s.name, [p for p in s.points if _drawable(p[1], log_y)], s.main, s.band, s.soft) for s in series]
    points = [p for s in kept for p in s.points] + [(at, side) for s in kept for at, *sides in s.band for side in sides]
    if not points:
        return Markup("<p class=none>nothing to draw yet</p>")
    scale_x = _Scale.over([p[0] for p in points], LEFT, WIDTH - RIGHT)
    scale_y = _Scale.over([_of(p[1], log_y) for p in points] + ([0.0] if zero else []), HEIGHT - BOTTOM, TOP)
    found = [_frame(scale_x, scale_y, x, y, False, log_y)]
    loud = [one.name for one in kept if not one.soft]
    for one in sorted(kept, key=lambda each: (not each.soft, each.main)):
        hue = "soft" if one.soft else f"c{loud.index(one.name) % HUES}"
        if one.band:
            edge = [(at, high) for at, _, high in one.band] + [(at, low) for at, low, _ in reversed(one.band)]
            found.append(
                Markup('<polygon class="band {}" points="{}"/>').format(hue, _path(edge, scale_x, scale_y, False, log_y))
            )
        path, told = (
            _path(one.points, scale_x, scale_y, False, log_y),
            f"{one.name}: {one.points[-1][1]:.4g}" if one.points else one.name,
        )
        kind = f"line {hue}{' main' if one.main else ''}"
        found.append(Markup('<polyline class="{}" points="{}"><title>{}</title></polyline>').format(kind, path, told))
        if len(one.points) == 1:
            at = path.split(",")
            found.append(Markup('<circle class="dot {}" cx="{}" cy="{}" r="3"><title>{}</title></circle>').format(hue, *at, told))
    return _svg(WIDTH, HEIGHT, found) + legend(loud)


def scatter(points: Mapping[str, tuple[float, float]], front: Sequence[str], x: str, y: str) -> Markup:
    """Named points over a logarithmic x; those on the front are joined."""
    wide, high = 2 * WIDTH, 2 * HEIGHT
    scale_x = _Scale.over([math.log10(at) for at, _ in points.values()], LEFT, wide - 150)
    scale_y = _Scale.over([value for _, value in points.values()], high - BOTTOM, TOP + 10)
    found = [_frame(scale_x, scale_y, x, y, True, False, wide, high)]
    joined = sorted(points[name] for name in front)
    found.append(Markup('<polyline class="line c0" points="{}"/>').format(_path(joined, scale_x, scale_y, True, False)))
    taken: list[tuple[float, float]] = []  # where names stand
    for name, (at, value) in sorted(points.items(), key=lambda each: -each[1][1]):
        px, py = scale_x(math.log10(at)), scale_y(value)
        line = py + 4
        while any(abs(line - other) < 12 and abs(px - beside) < 110 for beside, other in taken):
            line += 2
        taken.append((px, line))
        hue = "c0" if name in front else "soft"
        told = f"{name}: {value:.4g} at {at:.4g}"
        found.append(
            Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="4"><title>{}</title></circle>').format(hue, px, py, told)
        )
        found.append(Markup('<text class="tick {}" x="{:.1f}" y="{:.1f}">{}</text>').format(hue, px + 7, line, name[:24]))
    return _svg(wide, high, found)


def bars(rows: Mapping[str, Mapping[str, float | None]], most: float | None = None) -> Markup:
    """Horizontal bars, a group for each row, a bar for each kind. most: the end of the axis, by default the largest value."""
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    end = most or max((value for row in rows.values() for value in row.values() if value), default=1.0)
    label, thick, gap = 130, 11, 9
    height, found = 6, list[Markup]()
    for name, row in rows.items():
        middle = height + thick * len(kinds) / 2 + 4
        found.append(Markup('<text class=tick x="{}" y="{:.0f}" text-anchor=end>{}</text>').format(label - 6, middle, name[:20]))
        for i, kind in enumerate(kinds):
            value = row.get(kind)
            if value is None or not math.isfinite(value):
                continue
            wide, at = (WIDTH - label - 48) * max(0.0, value) / end, height + i * thick
            found.append(
                Markup('<rect class="fill c{}" x="{}" y="{}" width="{:.1f}" height="{}"><title>{}</title></rect>').format(
                    i % HUES, label, at, wide, thick - 1, f"{name}, {kind}: {value:.4g}"
                )
            )
            found.append(Markup('<text class=tick x="{:.1f}" y="{}">{:.3g}</text>').format(label + wide + 4, at + 9, value))
        height += thick * len(kinds) + gap
    return _svg(WIDTH, height, found) + legend(kinds)


def matrix(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], low: float, high: float) -> Markup:
    """A map: the fuller a cell's colour, the nearer its value is to `high`; a cell tells its value when pointed at."""
    side, label = max(10, min(34, (WIDTH - 140) // max(1, len(columns)))), 130
    found = []
    for i, (name, row) in enumerate(zip(rows, values, strict=True)):
        y = 4 + i * side
        told = Markup('<text class=tick x="{}" y="{}" text-anchor=end>{}</text>')
        found.append(told.format(label - 6, y + side // 2 + 4, name[:20]))
        for j, (column, value) in enumerate(zip(columns, row, strict=True)):
            share = min(1.0, max(0.0, (value - low) / (high - low or 1.0))) if math.isfinite(value) else 0.0
            cell = Markup('<rect class=cell x="{}" y="{}" width="{}" height="{}" fill-opacity="{:.2f}"><title>{}</title></rect>')
            found.append(cell.format(label + j * side, y, side - 1, side - 1, share, f"{name}, {column}: {value:.3g}"))
            if side >= 28:
                number = Markup('<text class="tick {}" x="{}" y="{}" text-anchor=middle>{:.2f}</text>')
                ink = "over" if share > 0.5 else ""
                found.append(number.format(ink, label + j * side + side // 2, y + side // 2 + 4, value))
    return _svg(label + side * len(columns) + 4, side * len(rows) + 8, found)


def legend(names: Sequence[str]) -> Markup:
    """Which colour is whose."""
    item = Markup('<span class="key c{}"></span>{} ')
    return Markup("<p class=legend>{}</p>").format(Markup("").join(item.format(i % HUES, name) for i, name in enumerate(names)))


@dataclass(frozen=True)
class _Scale:
    least: float
    most: float
    begin: float
    end: float
    whole: bool  # whether all values are whole numbers, such as rounds

    @classmethod
    def over(cls, values: Sequence[float], begin: float, end: float) -> "_Scale":
        least, most = min(values), max(values)
        if least == most:
            least, most = least - 0.5, most + 0.5
        return cls(least, most, begin, end, all(value == int(value) for value in values))

    def __call__(self, value: float) -> float:
        return self.begin + (self.end - self.begin) * (value - self.least) / (self.most - self.least)

    @property
    def ticks(self) -> list[float]:
        """Round numbers inside."""
        rough = (self.most - self.least) / TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        step = max(step, 1.0) if self.whole else step
        first = math.ceil(self.least / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.most / step + 1e-9) + 1)]


def _ticks(scale: _Scale, log: bool) -> list[float]:
    """Where an axis has numbers."""
    if not log:
        return scale.ticks
    powers = range(math.floor(scale.least), math.ceil(scale.most) + 1)
    fine = [power + math.log10(digit) for power in powers for digit in (1, 2, 5)]
    inside = [tick for tick in fine if scale.least <= tick <= scale.most]
    return inside if len(inside) <= 2 * TICKS else [tick for tick in inside if tick == round(tick)]


def _drawable(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _of(value: float, log: bool) -> float:
    return math.log10(value) if log else value


def _path(points: Sequence[tuple[float, float]], scale_x: _Scale, scale_y: _Scale, log_x: bool, log_y: bool) -> str:
    return " ".join(f"{scale_x(_of(x, log_x)):.1f},{scale_y(_of(y, log_y)):.1f}" for x, y in points)


def _frame(
    scale_x: _Scale, scale_y: _Scale, x: str, y: str, log_x: bool, log_y: bool, wide: int = WIDTH, high: int = HEIGHT
) -> Markup:
    found = Markup("")
    for tick in _ticks(scale_y, log_y):
        at, told = scale_y(tick), f"{10**tick if log_y else tick:.4g}"
        found += Markup('<line class=grid x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, wide - RIGHT, at, at)
        found += Markup('<text class=tick x="{}" y="{:.1f}" text-anchor=end>{}</text>').format(LEFT - 6, at + 4, told)
    for tick in _ticks(scale_x, log_x):
        found += Markup('<text class=tick x="{:.1f}" y="{}" text-anchor=middle>{:.4g}</text>').format(
            scale_x(tick), high - BOTTOM + 14, 10**tick if log_x else tick
        )
    found += Markup('<text class=tick x="{}" y="{}" text-anchor=end>{}</text>').format(wide - RIGHT, high - 4, x)
    return found + Markup('<text class=tick x="4" y="10">{}</text>').format(y)


def _svg(width: float, height: float, inside: Sequence[Markup]) -> Markup:
    head = Markup('<svg viewBox="0 0 {} {}" role=img style="max-width:{}px">').format(width, height, width)
    return head + Markup("").join(escape(each) for each in inside) + Markup("</svg>")
