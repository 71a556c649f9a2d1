from dataclasses import fields

import numpy as np
import pytest
from reference import random_store, rebuilt

from hf_auxselect.store.format import StoreError
from hf_auxselect.store.records import InitialLosses, Probes, RemainingTraining

TRAINING = RemainingTraining(
    learning_rates=(0.2, 0.1),
    group_learning_rates=((0.2, 0.1), (0.4, 0.2)),
    learning_rates_are_known=False,
    momentum_coefficients=(0.9, 0.8),
    max_grad_norm=1.0,
    examples_per_step=8,
    after="restart",
    examples_per_row={"a": 2.5},
)


def test_the_remaining_training_is_read_as_it_was_written():
    assert RemainingTraining.from_json(TRAINING.to_json()) == TRAINING
    assert RemainingTraining.from_json(RemainingTraining().to_json()) == RemainingTraining()
    assert TRAINING.total_group_rates == pytest.approx([0.3, 0.6])
    assert RemainingTraining().total_group_rates is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rates", 0.1),
        ("max_grad_norm", "no"),
        ("after", "stop"),
        ("examples_per_row", [1]),
    ],
)
def test_a_damaged_record_is_named(name, value):
    with pytest.raises(StoreError, match=f"training has {name}=.*damaged"):
        RemainingTraining.from_json({name: value})


def test_a_store_without_them_has_no_records():
    store = rebuilt(random_store(0), metadata={}, vectors={})
    records = [store.remaining_training, store.optimizer, store.probes, store.initial_losses]
    assert records == [None] * 4
    with_probes = random_store(0, look_ahead=True)
    assert with_probes.probes is not None
    assert with_probes.target.probes is None


def test_the_optimizer_is_that_of_the_metadata_and_the_vectors():
    store = random_store(0)
    optimizer = store.optimizer
    assert (optimizer.momentum_coefficient, optimizer.weight_decay) == (0.9, 0.01)
    assert (optimizer.steps_taken, optimizer.decay_is_coupled) == (7, False)
    assert np.array_equal(optimizer.momentum_D, store.vectors["momentum"])
    damaged = rebuilt(store, vectors={"momentum": store.vectors["momentum"]})
    with pytest.raises(StoreError, match="no 'parameters'"):
        damaged.optimizer.weight_decay  # noqa: B018


class TestProbes:
    def test_an_old_store_derives_the_examples_that_were_read(self):
        probes = random_store(0, counts=(100, 5), num_target=9, look_ahead=True).probes
        assert probes.target_example_ids.tolist() == [0, 1, 2, 4, 5, 6, 8]
        assert len(probes.task_example_ids[0]) == 64
        assert probes.task_example_ids[0][[0, -1]].tolist() == [0, 99]
        assert probes.task_example_ids[1].tolist() == [100, 101, 102, 103, 104]

    def test_what_is_written_is_read(self):
        store = random_store(0, look_ahead=True)
        probes = Probes(
            **{
                f.name: getattr(store.probes, f.name)
                for f in fields(Probes)
                if not f.name.endswith("_ids")
            },
            task_example_ids=[np.array(ids) for ids in ([3], [9, 7], [20])],
            target_example_ids=np.array([1, 2, 3, 4, 5, 6, 2**40]),
        )
        read = store.with_vectors(probes.to_vectors()).probes
        assert [ids.tolist() for ids in read.task_example_ids] == [[3], [9, 7], [20]]
        assert np.array_equal(read.target_example_ids, probes.target_example_ids)
        assert np.array_equal(read.secant_points_KD, probes.secant_points_KD)


def test_initial_losses_say_whose_they_are():
    store = random_store(0)
    losses = InitialLosses(losses_T=np.array([1.5, 2.5]), example_ids=np.array([3, 8]))
    read = store.with_vectors(losses.to_vectors()).initial_losses
    assert read.losses_T.tolist() == [1.5, 2.5]
    assert read.example_ids.tolist() == [3, 8]
    old = store.with_vectors({"initial_losses": losses.losses_T}).initial_losses
    assert old.example_ids.tolist() == [0, 8]


def test_rows_are_found_by_example_id():
    target = rebuilt(random_store(0).target, example_ids=[4, 9, 2, 1, 0, 3, 5, 6, 7])
    assert target.rows_of(np.array([9, 0])).tolist() == [1, 4]
    with pytest.raises(StoreError, match="lacks examples"):
        target.rows_of(np.array([9, 10]))
