"""Series speak Prometheus exactly as its own library does, and hand out the same child every time."""

from __future__ import annotations

import math
from collections import Counter
from threading import Event, Thread

import prometheus_client as reference
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from holdfast.telemetry.series import TICKS_PER_SECOND, Buckets, Cells, Histograms

BOUNDS = (0.001, 0.01, 0.1, 1.0, 5.0)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 10) | st.sampled_from(BOUNDS)), max_size=30),
    st.integers(0, 5),
)
def test_what_is_exposed_is_what_the_library_would_expose(seen: list[tuple[str, float]], unlabelled: int) -> None:
    reference.disable_created_metrics()
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    counter, gauge = Cells("c_total", "C.", ("who",), counter=True), Cells("g", "G.", (), counter=False)
    histogram = Histograms("h_seconds", "H.", ("who",), BOUNDS)
    for one in (counter, gauge, histogram):
        ours.register(one)
    their_counter = reference.Counter("c_total", "C.", ("who",), registry=theirs)
    their_gauge = reference.Gauge("g", "G.", registry=theirs)
    their_histogram = reference.Histogram("h_seconds", "H.", ("who",), registry=theirs, buckets=BOUNDS)
    for who, value in seen:
        for series in (counter, their_counter):
            series.labels(who).inc(value)
        for each in (histogram, their_histogram):
            each.labels(who).observe(value)
    gauge.labels().set(unlabelled)
    their_gauge.set(unlabelled)
    assert generate_latest(ours) == generate_latest(theirs)


def test_children_are_found_again_and_wrong_labels_are_refused() -> None:
    cells = Cells("c_total", "C.", ("a", "b"), counter=True)
    assert cells.labels("x", "y") is cells.labels("x", "y")
    with pytest.raises(ValueError, match="labels"):
        cells.labels("x")


def test_a_gauge_returns_however_its_block_ends() -> None:
    cell = Cells("g", "G.", (), counter=False).labels()

    def failing() -> None:
        with cell:
            assert cell.value == 1
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert cell.value == 0


def test_ticks_count_into_the_bucket_whose_bound_they_do_not_exceed() -> None:
    buckets = Buckets((0.001, 0.01, 0.1))
    buckets.add_ticks(Counter({0: 2, 10: 1, 11: 4, 1000: 1, 1001: 5}))
    assert buckets.counts == [3, 4, 1, 5]
    assert buckets.sum * TICKS_PER_SECOND == pytest.approx(10 + 44 + 1000 + 5005)


def test_the_text_is_what_the_library_would_write() -> None:
    """Odd values, odd labels, no children, forgotten children."""
    cells = Cells("a_total", 'Help with \\ and "quotes"\nand lines.', ("x", "y"), counter=True)
    gauges = Cells("b", "Gauge.", (), counter=False)
    empty = Cells("c", "Nothing yet.", ("x",), counter=False)
    histograms = Histograms("d_seconds", "Histogram.", ("x",), (0.1, 1.0, 2.5))
    cells.labels('a"b', "c\\d\ne").inc(3)
    cells.labels("", "ü").inc(0.1)
    for value in (0.5, 0.1, 7):
        histograms.labels("m").observe(value)
    registry = CollectorRegistry()
    for series in (cells, gauges, empty, histograms):
        registry.register(series)
    for value in (1e300, math.inf, -math.inf, True, 3, 1e-7):
        gauges.labels().set(value)
        ours = "".join(series.expose() for series in (cells, gauges, empty, histograms))
        assert parsed(ours) == parsed(generate_latest(registry).decode())
    cells.clear()
    assert cells.expose().count("\n") == 2
    cells.labels("1", "2").inc()
    assert 'a_total{x="1",y="2"} 1.0\n' in cells.expose()


def parsed(text: str) -> list[object]:
    found: list[object] = []
    for family in text_string_to_metric_families(text):
        samples = sorted((s.name, sorted(s.labels.items()), s.value) for s in family.samples)
        found.append((family.name, family.type, family.documentation, samples))
    return found


def test_texts_of_label_sets_that_are_gone_are_not_kept_for_ever() -> None:
    cells = Cells("a", "Gauge.", ("worker",), counter=False)
    for number in range(2000):
        cells.clear()
        cells.labels(str(number)).set(1)
        assert f'a{{worker="{number}"}} 1.0' in cells.expose()
    assert len(cells._heads) < 300


def test_noted_values_count_like_observed_ones_however_often_they_are_folded() -> None:
    at_once, later = Buckets(BOUNDS), Buckets(BOUNDS)
    for number in range(100):
        value = BOUNDS[number % len(BOUNDS)] * (0.5 + number % 3)
        at_once.observe(value)
        later.note(value)
        if number % 7 == 0:
            later.fold()
            assert not later.fresh
    assert later.counts == at_once.counts
    assert later.sum == pytest.approx(at_once.sum)
    assert sum(later.counts) == 100


def test_values_noted_while_others_are_read_are_counted_once() -> None:
    buckets = Buckets(BOUNDS)
    stop = Event()

    def scrape() -> None:
        while not stop.is_set():
            assert sum(buckets.counts) <= 20_000

    scraping = Thread(target=scrape)
    scraping.start()
    try:
        for number in range(20_000):
            buckets.note(0.5)
            if number % 50 == 0:
                buckets.fold()
    finally:
        stop.set()
        scraping.join()
    assert sum(buckets.counts) == 20_000
    assert buckets.sum == 10_000.0
