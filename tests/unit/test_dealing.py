"""Who reads what several ranks want pieces of: every byte has one reader, and readers have equal runs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_stateful.format.chunks import Box
from ray_stateful.format.index import StoredChunk
from ray_stateful.storage.dealing import Deal, Span, between, is_small, pays, weigh, window, window_bytes

MIB = 1 << 20

# Names of item files, out of order, and their sizes; some are empty.
FILES = st.dictionaries(
    st.tuples(st.integers(0, 20), st.integers(0, 12)).map(lambda place: "__{}_{}.distcp".format(*place)),
    st.integers(0, 50),
    min_size=1,
)
SPANS = st.lists(
    st.tuples(st.integers(0, 500), st.integers(1, 60), st.integers(0, 2)).map(lambda s: Span(s[0], s[0] + s[1], s[2])),
    unique=True,
).map(sorted)


def chunk(sizes, dtype="float32"):
    return StoredChunk(
        key="t",
        path=("part", "t"),
        dtype=dtype,
        shape=sizes,
        box=Box((0,) * len(sizes), sizes),
        file="__0_0.distcp",
        item_offset=0,
        item_length=1 << 40,
        data_offset=0,
        block_bytes=1024,
        checksums=b"",
    )


@given(FILES, st.integers(1, 9))
def test_files_lie_end_to_end_in_the_order_of_their_writers_and_each_rank_reads_an_equal_run(sizes, world_size):
    deal = Deal.of({**sizes, "index.arrow": 1000, ".metadata": 1000}, world_size)

    places = [
        (file, offset)
        for file in sorted(sizes, key=lambda name: [int(n) for n in name[2:-7].split("_")])
        for offset in range(sizes[file])
    ]
    spans = [Span(position, position + 1, 0) for position in range(len(places))]
    assert [deal.place(span) for span in spans] == [(file, offset, offset + 1) for file, offset in places]
    readers = [deal.reader_of(span) for span in spans]
    assert readers == sorted(readers)
    runs = [readers.count(rank) for rank in range(world_size)]
    assert sum(runs) == len(places)
    assert max(runs) - min(runs) <= 1


@given(SPANS, st.integers(1, 200))
def test_windows_hold_every_span_once_and_no_more_bytes_than_they_may(spans, max_bytes):
    begin, found = 0, []
    while (end := window(spans, begin, max_bytes)) != begin:
        here = between(spans, begin, end)
        covered = {position for span in here for position in range(span.begin, span.stop)}
        # What begins at one place is read together, whatever its size; it is at least one.
        assert here
        assert len(covered) <= max_bytes or len({span.begin for span in here}) == 1
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
    weight = weigh((chunk(sizes), box) for box in wanted)

    assert weight[1] == 4 * sum(box.num_elements for box in wanted)
    assert pays([weight]) == passed_on
    # It is decided for all ranks together: what one of them alone would not do, the others may make worth it.
    assert pays([weight, (1000, 1000)]) == pays([(weight[0] + 1000, weight[1] + 1000)])
    assert not pays([(0, weight[1])])


def test_a_long_run_of_bytes_has_a_request_of_its_own():
    rows = chunk((4096, 256))
    assert is_small(rows, Box((0, 0), (1023, 256)))
    assert not is_small(rows, Box((0, 0), (1024, 256)))
    # The left half of a row is a run of its own, whatever the number of rows.
    assert is_small(rows, Box((0, 0), (4096, 128)))


def test_what_is_sent_to_a_rank_at_a_time_is_bounded_whatever_the_number_of_its_readers():
    assert [window_bytes(readers) * max(1, readers) for readers in (0, 1, 2, 4, 64)] == [64 * MIB] * 5
    assert window_bytes(1000) == MIB
