import math
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from evals.charts import bar, curve, smooth, strip, ticks
from evals.stats import wilson

finite = st.floats(-1e6, 1e6)


@given(finite, finite)
def test_ticks_lie_inside_and_are_few(a, b):
    got = ticks(min(a, b), max(a, b))
    assert len(got) <= 6 and got == sorted(got)
    if b - a > 1e-3:
        slack = 1e-6 * (b - a)
        assert all(a - slack <= t <= b + slack for t in got)


def test_round_ticks():
    assert ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert ticks(0, 800) == [0, 200, 400, 600, 800]


@given(st.lists(st.tuples(st.integers(0, 500), st.floats(allow_nan=True)), max_size=50))
def test_any_series_is_well_formed_svg(points):
    svg = curve('loss <b>&"', {"train </script>": points})
    if svg:
        ElementTree.fromstring(svg)
    assert bool(svg) == any(math.isfinite(y) for _, y in points)


def test_values_that_are_not_finite_are_counted():
    assert "not finite: 1" in curve("loss", {"train": [(0, 1.0), (1, float("nan")), (2, 0.5)]})


def test_smoothing_has_no_lag():
    ramp = [float(i) for i in range(20)]
    assert smooth(ramp, 3) == ramp
    assert smooth([0.0, 3.0, 0.0, 3.0, 0.0], 1) == [0.0, 1.0, 2.0, 1.0, 0.0]


def test_strip_and_bar_are_drawn_to_scale():
    tree = ElementTree.fromstring(strip(wilson(57, 60), 2))
    band = tree.find("rect")
    assert float(band.get("x")) == round(100 * wilson(57, 60).low, 2) and tree.get("aria-label") == "95.0 % [86–98]"
    assert tree.findall("line")[-1].get("x1") == "95.00"
    assert ElementTree.fromstring(bar(7.0)).findall("rect")[1].get("width") == "100.00"
