"""The order in which rows of a mixture are drawn."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_auxselect.sampler import MixtureSampler
from hf_auxselect.tasks import TaskRows

counts = st.lists(st.integers(1, 30), min_size=1, max_size=5)


def sampler(counts, shares, **options):
    labels = [f"t{k}" for k, count in enumerate(counts) for _ in range(count)]
    return MixtureSampler(TaskRows.from_labels(labels), np.asarray(shares, float), 7, **options)


class TestMixtureSampler:
    @given(counts, st.integers(0, 200), st.integers(0, 200), st.data())
    def test_it_can_be_entered_anywhere(self, counts, start, length, data):
        raw = np.array(data.draw(st.lists(st.floats(0.05, 1), min_size=len(counts), max_size=5)))
        shares = raw[: len(counts)] / raw[: len(counts)].sum()
        whole = list(sampler(counts, shares, length=start + length))
        assert list(sampler(counts, shares, start=start, length=length)) == whole[start:]

    @given(counts)
    def test_shares_in_proportion_to_rows_give_shuffled_epochs(self, counts):
        total = sum(counts)
        drawn = list(sampler(counts, np.array(counts) / total, length=3 * total))
        for epoch in range(3):
            assert sorted(drawn[epoch * total : (epoch + 1) * total]) == list(range(total))

    @given(counts, st.data())
    def test_within_a_task_rows_repeat_only_when_all_are_used(self, counts, data):
        raw = np.array(
            data.draw(st.lists(st.floats(0.05, 1), min_size=len(counts), max_size=len(counts)))
        )
        drawn = np.array(list(sampler(counts, raw / raw.sum(), length=300)))
        ends = np.cumsum(counts)
        for end, count in zip(ends, counts, strict=True):
            own = drawn[(drawn >= end - count) & (drawn < end)]
            for first in range(0, len(own), count):
                one_pass = own[first : first + count]
                assert len(set(one_pass)) == len(one_pass)

    def test_shares_are_exact_over_blocks_and_fair_within(self):
        shares = [0.5, 0.3, 0.2, 0.0]
        drawn = np.array(list(sampler([10, 400, 90, 50], shares, length=5000)))
        edges = [0, 10, 410, 500, 550]
        for k, share in enumerate(shares):
            own = (drawn >= edges[k]) & (drawn < edges[k + 1])
            assert own.sum() == 5000 * share  # 5,000 draws are whole blocks of 500
            part = own[:1000].sum()
            assert abs(part - 1000 * share) <= 4 * np.sqrt(1000 * share * (1 - share))

    def test_a_tiny_share_is_served_in_time(self):
        drawn = Counter(list(sampler([1, 5], [0.001, 0.999], length=10_000)))
        assert drawn[0] == 10

    @given(counts, st.integers(0, 200), st.integers(0, 200))
    def test_reads_count_what_is_drawn(self, counts, start, length):
        shares = np.arange(len(counts)) + 1.0
        drawn = sampler(counts, shares / shares.sum(), start=start, length=length)
        assert drawn.reads().tolist() == np.bincount([*drawn], minlength=sum(counts)).tolist()

    @pytest.mark.parametrize(
        ("shares", "message"),
        [
            ([0.5, 0.6], "sum to 1"),
            ([1.0], "one number per task"),
            ([1 - 1e-9, 1e-9], "share of task 't1' is below 1e-06"),
            ([1.5, -0.5], "share of task 't1' is below"),
        ],
    )
    def test_bad_shares(self, shares, message):
        with pytest.raises(ValueError, match=message):
            sampler([3, 3], shares)

    def test_another_seed_gives_another_order(self):
        tasks = TaskRows.from_labels(["a"] * 20)
        one, other = (list(MixtureSampler(tasks, np.ones(1), s, length=20)) for s in (1, 2))
        assert one != other
        assert sorted(one) == sorted(other)
