"""Intervals for shares: nothing is reported without its n."""

import math
from collections import Counter
from dataclasses import dataclass

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Share:
    """k of n, with its Wilson score interval [low, high] (all in 0..1)."""

    k: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        return self.k / self.n if self.n else 0.0

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.0f}–{100 * self.high:.0f}]" if self.n else "–"

    def to_dict(self) -> dict:
        return {"k": self.k, "n": self.n, "value": self.value, "low": self.low, "high": self.high}


def wilson(k: int, n: int) -> Share:
    """Wilson (1927) score interval. Unlike the normal one it is right at 0 and n: 0 of 50 still allows 7.1 %.

    n = 0 gives [0, 1]: nothing is known. Raises ValueError unless 0 <= k <= n.
    """
    if not 0 <= k <= n:
        raise ValueError(f"a share needs 0 <= k <= n, got {k} of {n}")
    if n == 0:
        return Share(0, 0, 0.0, 1.0)
    p, z, z2 = k / n, Z_95, Z_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # at the ends the exact limits are 0 and 1; rounding would leave 1e-18
    return Share(k, n, 0.0 if k == 0 else centre - half, 1.0 if k == n else centre + half)


def share(outcomes: list[bool]) -> Share:
    return wilson(sum(map(bool, outcomes)), len(outcomes))


@dataclass(frozen=True)
class Paired:
    """after - before on the same items: difference with interval, exact p, items won and lost."""

    diff: float
    low: float
    high: float
    p: float
    won: int
    lost: int
    n: int

    def __str__(self) -> str:
        if not self.n:
            return "–"
        p = "p < 0.001" if self.p < 0.001 else f"p = {self.p:.3f}"
        return f"{100 * self.diff:+.1f} pp [{100 * self.low:+.0f} to {100 * self.high:+.0f}], {p}"


def paired(before: list[bool], after: list[bool]) -> Paired:
    """Paired difference of two shares.

    Interval: Newcombe (1998), method 10, which stays sensible at 0 and 100 % where a bootstrap has no width.
    p: McNemar's exact two-sided test. Raises ValueError when the lists differ in length.
    """
    if len(before) != len(after):
        raise ValueError(f"paired lists differ in length: {len(before)} and {len(after)}")
    n = len(before)
    if n == 0:
        return Paired(0.0, -1.0, 1.0, 1.0, 0, 0, 0)
    table = Counter((bool(b), bool(a)) for b, a in zip(before, after))
    both, won, lost, neither = table[True, True], table[False, True], table[True, False], table[False, False]
    first, second = wilson(both + won, n), wilson(both + lost, n)
    phi = _phi(both, won, lost, neither)
    diff = (won - lost) / n
    down1, up1 = first.value - first.low, first.high - first.value
    down2, up2 = second.value - second.low, second.high - second.value
    low = diff - math.sqrt(max(0.0, down1**2 - 2 * phi * down1 * up2 + up2**2))
    high = diff + math.sqrt(max(0.0, up1**2 - 2 * phi * up1 * down2 + down2**2))
    return Paired(diff, low, high, mcnemar(won, lost), won, lost, n)


def _phi(a: int, b: int, c: int, d: int) -> float:
    """Correlation of a 2×2 table, with Newcombe's continuity correction; 0 when a margin is empty."""
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    if margins == 0:
        return 0.0
    cross = a * d - b * c
    return (max(cross - (a + b + c + d) / 2, 0) if cross > 0 else cross) / math.sqrt(margins)


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided p of McNemar's test: a fair coin over the discordant items."""
    n = won + lost
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(won, lost) + 1)) / 2**n)
