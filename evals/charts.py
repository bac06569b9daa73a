"""Inline SVG for the report: curves and interval strips, coloured by CSS classes, so both colour schemes and print work."""

import math

from markupsafe import Markup, escape

from evals.stats import Share

WIDTH, HEIGHT = 420, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 30


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover [low, high], about `count` of them."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def smooth(values: list[float], half: int) -> list[float]:
    """Centred moving mean over 2·half + 1 values, narrower near the ends: no lag, which a trailing average would have."""
    reach = [min(half, i, len(values) - 1 - i) for i in range(len(values))]
    return [sum(values[i - r : i + r + 1]) / (2 * r + 1) for i, r in enumerate(reach)]


def curve(title: str, series: dict[str, list[tuple[float, float]]]) -> Markup:
    """One line chart. series: legend -> [(step, value)]; values that are not finite are left out and counted.

    With 40 points and more the raw line is drawn faint under its moving mean.
    """
    clean = {name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in series.items()}
    dropped = sum(map(len, series.values())) - sum(map(len, clean.values()))
    if not any(clean.values()):
        return Markup("")
    xs, ys = zip(*(point for line in clean.values() for point in line))
    x_low, x_high = min(xs), max(xs)
    pad = (max(ys) - min(ys)) * 0.05 or abs(max(ys)) * 0.05 or 0.5
    y_low, y_high = min(ys) - pad, max(ys) + pad

    def place(x: float, y: float) -> str:
        across = (x - x_low) / ((x_high - x_low) or 1)
        up = (y - y_low) / (y_high - y_low)
        return f"{LEFT + across * (WIDTH - LEFT - RIGHT):.1f},{HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM):.1f}"

    parts, legend = [_grid(place, (x_low, x_high), (y_low, y_high))], []
    for index, (name, line) in enumerate(clean.items(), 2):
        if line:
            legend.append(f'<span class="key s{index}">{escape(name)} <b>{number(line[-1][1])}</b></span>')
        if len(line) >= 40:
            parts.append(f'<polyline class="raw s{index}" points="{" ".join(place(*p) for p in line)}"/>')
            line = list(zip([x for x, _ in line], smooth([y for _, y in line], len(line) // 16)))
        parts.append(f'<polyline class="line s{index}" points="{" ".join(place(*p) for p in line)}"/>')
        if line:
            x, y = place(*line[-1]).split(",")
            parts.append(f'<circle class="s{index}" cx="{x}" cy="{y}" r="3"><title>{escape(name)}</title></circle>')
    if dropped:
        legend.append(f'<span class="bad">not finite: {dropped}</span>')
    return Markup(  # every piece above is a number or escaped
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f'<p class="legend">{"".join(legend)}</p></figure>'
    )


def _grid(place, x_range: tuple[float, float], y_range: tuple[float, float]) -> str:
    parts = []
    for y in ticks(*y_range):
        at = place(x_range[0], y).split(",")[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{LEFT - 8}" y="{float(at) + 4:.1f}">{number(y)}</text>')
    for x in ticks(*x_range):
        at = place(x, y_range[0]).split(",")[0]
        parts.append(f'<text class="tick" text-anchor="middle" x="{at}" y="{HEIGHT - 10}">{number(x)}</text>')
    return "".join(parts)


def strip(share: Share, index: int) -> Markup:
    """A share on a line from 0 to 100 %: the band is its 95 % interval, the tick its value."""
    low, high, value = 100 * share.low, 100 * share.high, 100 * share.value
    return Markup(
        f'<svg class="strip s{index}" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{escape(share)}">'
        '<line class="rail" x1="0" x2="100" y1="5" y2="5"/>'
        '<line class="mark" x1="50" x2="50" y1="3" y2="7"/>'
        f'<rect class="band" x="{low:.2f}" width="{max(high - low, 0.4):.2f}" y="1.5" height="7"/>'
        f'<line class="value" x1="{value:.2f}" x2="{value:.2f}" y1="0" y2="10"/></svg>'
    )


def bar(fraction: float) -> Markup:
    width = 100 * min(max(fraction, 0.0), 1.0)
    return Markup(
        '<svg class="bar" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="rail" width="100" height="6"/><rect class="fill" width="{width:.2f}" height="6"/></svg>'
    )
