import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.stats import mcnemar, paired, share, wilson


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (0, 50, 0.0, 0.0713),  # published: at most 7.1 %
        (0, 164, 0.0, 0.0229),
        (0, 200, 0.0, 0.0188),
        (100, 200, 0.4314, 0.5686),  # ±6.9 points
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
        (50, 50, 0.9287, 1.0),
    ],
)
def test_wilson_known_values(k, n, low, high):
    got = wilson(k, n)
    assert got.low == pytest.approx(low, abs=6e-5)
    assert got.high == pytest.approx(high, abs=6e-5)


def test_wilson_half_is_symmetric():
    got = wilson(100, 200)
    assert got.high - 0.5 == pytest.approx(0.5 - got.low)
    assert round(100 * (got.high - 0.5), 1) == 6.9


@given(st.integers(0, 300), st.integers(0, 300))
def test_wilson_holds_its_share(k, extra):
    n = k + extra
    got = wilson(k, n)
    assert 0 <= got.low <= got.value <= got.high <= 1
    if n:
        mirror = wilson(extra, n)
        assert got.low == pytest.approx(1 - mirror.high)


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5)])
def test_wilson_refuses_nonsense(k, n):
    with pytest.raises(ValueError):
        wilson(k, n)


def test_format():
    assert str(wilson(57, 60)) == "95.0 % [86–98]"
    assert str(wilson(0, 0)) == "–"
    assert share([True, False, 1, 0]).k == 2


def _table(a, b, c, d):
    before = [True] * a + [False] * b + [True] * c + [False] * d
    after = [True] * a + [True] * b + [False] * c + [False] * d
    return before, after


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),  # Newcombe 1998 (paired), method 10
        ((20, 12, 2, 16), 0.0562, 0.3292),  # a positive correlation, with its continuity correction
        ((50, 0, 0, 0), -0.0713, 0.0713),  # no item changed: as wide as 0 of 50
    ],
)
def test_paired_known_values(table, low, high):
    got = paired(*_table(*table))
    assert got.low == pytest.approx(low, abs=6e-5)
    assert got.high == pytest.approx(high, abs=6e-5)
    assert got.won == table[1] and got.lost == table[2]


def test_mcnemar_is_exact():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(10, 0) == pytest.approx(2 / 1024)
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(9, 2) == pytest.approx(2 * sum(math.comb(11, i) for i in range(3)) / 2**11)


def test_paired_direction_and_text():
    got = paired([False] * 20, [True] * 20)
    assert got.diff == 1 and got.low > 0.7 and got.high <= 1
    assert str(got).startswith("+100.0 pp") and "p < 0.001" in str(got)
    with pytest.raises(ValueError):
        paired([True], [])
    assert str(paired([], [])) == "–"
