"""Who reads what several ranks want pieces of: every byte has one reader, and readers have equal runs."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_stateful.format.chunks import Box
from ray_stateful.format.manifest import Manifest
from ray_stateful.storage.dealing import Deal, Span, between, is_small, pays, weigh, window, window_bytes
from ray_stateful.storage.ranges import ReadLimits
from tests.rows import tensor_row

MIB = 1 << 20
MANIFEST = Manifest(step=1, samples=0, world_size=4, attempt="abcdef", parts=(), files={})

# Names of item files, out of order, and their sizes; some are empty.
FILES = st.dictionaries(
    st.tuples(st.integers(0, 20), st.integers(0, 12)).map(lambda place: "__{}_{}.distcp".format(*place)),
    st.integers(0, 50),
    min_size=1,
)
SPANS = st.lists(
    st.tuples(st.integers(0, 500), st.integers(1, 60), st.integers(0, 2)).map(lambda s: Span(s[0], s[0] + s[1], s[2])),
).map(sorted)


def restored(file, first, stop):
    """A chunk that is bytes `first` to `stop` of a file."""
    return replace(tensor_row((stop - first,), "uint8"), file=file, data_offset=first)


def runs_of(deal, positions, world_size):
    readers = [deal.reader_of(Span(position, position + 1, 0)) for position in positions]
    assert readers == sorted(readers)
    return [readers.count(rank) for rank in range(world_size)]


@given(FILES, st.integers(1, 9))
def test_files_lie_end_to_end_in_the_order_of_their_writers_and_each_rank_reads_an_equal_run(sizes, world_size):
    everything = [restored(file, 0, size) for file, size in sizes.items()]
    deal = Deal.of({**sizes, "index.arrow": 1000, ".metadata": 1000}, everything, world_size)

    places = [
        (file, offset)
        for file in sorted(sizes, key=lambda name: [int(n) for n in name[2:-7].split("_")])
        for offset in range(sizes[file])
    ]
    spans = [Span(position, position + 1, 0) for position in range(len(places))]
    assert [deal.place(span) for span in spans] == [(file, offset, offset + 1) for file, offset in places]
    runs = runs_of(deal, range(len(places)), world_size)
    assert sum(runs) == len(places)
    assert max(runs) - min(runs) <= 1


def test_runs_are_equal_in_what_is_restored_whatever_else_the_files_hold():
    sizes = {"__0_0.distcp": 1000, "__0_1.distcp": 500, "__1_0.distcp": 1000}
    # The model, say, between other things of the first file, and half of the last.
    deal = Deal.of(sizes, [restored("__0_0.distcp", 100, 200), restored("__1_0.distcp", 0, 500)], 3)

    assert runs_of(deal, [*range(100, 200), *range(1500, 2000)], 3) == [200, 200, 200]
    # What nobody was said to want has a reader all the same.
    assert sum(runs_of(deal, range(2500), 3)) == 2500


@given(SPANS, st.integers(1, 200), st.integers(0, 20))
def test_windows_hold_every_span_once_and_no_more_bytes_than_they_may(spans, max_bytes, max_gap_bytes):
    limits = ReadLimits(max_gap_bytes=max_gap_bytes)
    begin, found = 0, []
    while (end := window(spans, begin, max_bytes, limits)) != begin:
        here = between(spans, begin, end)
        assert here
        # What is read, with what is read along, and what is sent; what begins at one place is read together.
        groups = Deal.of({"__0_0.distcp": 1000}, [], 1).requests(sorted(set(here)), limits)
        read = sum(stop - first for of_part in groups.values() for _, first, stop, _ in of_part)
        sent = sum(map(len, here))
        assert max(read, sent) <= max_bytes or len({span.begin for span in here}) == 1
        found += here
        begin = end
    assert found == spans


@pytest.mark.parametrize(
    ("sizes", "wanted", "passed_on"),
    [
        ((4000, 10), [Box((0, 0), (1000, 10))], True),  # a quarter of 160 kB: one request of 40 kB
        ((4000, 10), [Box((0, 0), (4000, 10))], False),  # the whole of it: nobody else wants any
        ((4000, 1000), [Box((0, 0), (1000, 1000))], False),  # a quarter of 16 MB: worth a request
        ((4000, 1000), [Box((0, 0), (4000, 500))], True),  # the left half: 4,000 requests of 2 kB
        ((4000, 10), [Box((0, 0), (1, 10))] + [Box((0, 0), (4000, 10))] * 9, False),  # one small cut beside much else
        ((), [Box((), ())], False),
    ],
)
def test_passing_on_pays_where_each_request_it_saves_is_for_few_bytes(sizes, wanted, passed_on):
    weight = weigh((tensor_row(sizes), box) for box in wanted)

    assert weight[1] == 4 * sum(box.num_elements for box in wanted)
    nothing, others = (0, 0), (10_000, 10_000)
    assert pays(MANIFEST, [nothing, weight]) == passed_on
    # It is decided for all ranks together: what one of them alone would not do, the others may make worth it.
    assert pays(MANIFEST, [weight, others])
    # A world of one has nobody to pass on to, and of a foreign checkpoint nobody else knows the files.
    assert not pays(MANIFEST, [weight])
    assert not pays(None, [nothing, weight])


def test_a_long_run_of_bytes_has_a_request_of_its_own():
    rows = tensor_row((4096, 256))
    assert is_small(rows, Box((0, 0), (1023, 256)))
    assert not is_small(rows, Box((0, 0), (1024, 256)))
    # The left half of a row is a run of its own, whatever the number of rows.
    assert is_small(rows, Box((0, 0), (4096, 128)))


def test_what_is_sent_to_a_rank_at_a_time_is_bounded_whatever_the_number_of_its_readers():
    limits = ReadLimits()
    assert [window_bytes(readers, limits) * max(1, readers) for readers in (0, 1, 2, 4, 32)] == [64 * MIB] * 5
    assert window_bytes(1000, limits) == 2 * MIB
    # Who set limits on what is read at a time gets no more in this way either.
    assert window_bytes(1, ReadLimits(max_fetch_bytes=MIB, num_threads=3)) == 3 * MIB
