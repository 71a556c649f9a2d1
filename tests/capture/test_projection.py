import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_auxselect.capture.projection import CountSketch


def matrix(sketch, name, size):
    """The projection of one parameter as a dense matrix [P, D]."""
    return sketch.project(name, torch.eye(size, dtype=torch.float64))


@given(st.integers(1, 300), st.integers(2, 64), st.integers(0, 5))
def test_every_entry_goes_to_one_cell_with_a_sign_and_cells_are_even(size, dim, seed):
    dense = matrix(CountSketch(dim, seed), "weight", size)
    assert ((dense != 0).sum(1) == 1).all()
    assert (dense.abs().sum(1) == 1).all()
    per_cell = (dense != 0).sum(0)
    assert per_cell.max() <= -(-size // dim)


def test_it_depends_on_seed_and_name_alone():
    gradients = torch.randn(3, 100)
    first = CountSketch(16, seed=1).project("a", gradients)
    again = CountSketch(16, seed=1)
    again.project("b", torch.randn(2, 40))
    assert torch.equal(first, again.project("a", gradients))
    assert not torch.equal(first, again.project("b", gradients[:, :40].repeat(1, 3)[:, :100]))
    assert not torch.equal(first, CountSketch(16, seed=2).project("a", gradients))


def test_numbers_of_this_version_do_not_change():
    # A change here breaks every stored gradient: raise PROJECTION_VERSION with it.
    projected = CountSketch(4, seed=0).project("weight", torch.arange(1.0, 9.0)[None])
    assert projected.tolist() == [[-11.0, 4.0, -9.0, -6.0]]


def test_inner_products_are_unbiased_with_the_variance_of_a_dense_rademacher_matrix():
    size, dim, seeds = 400, 32, 2000
    rng = np.random.default_rng(0)
    g, h = rng.normal(size=(2, size))
    h += 0.5 * g
    both = torch.from_numpy(np.stack([g, h]))
    products = []
    for seed in range(seeds):
        first, second = CountSketch(dim, seed).project("weight", both)
        products.append(float(first @ second))
    variance = ((g @ h) ** 2 + (g @ g) * (h @ h) - 2 * (g**2 * h**2).sum()) / dim
    standard_error = np.sqrt(variance / seeds)
    assert abs(np.mean(products) - g @ h) < 4 * standard_error
    # The variance of a sample variance is about 2 var^2 / n for near-normal products.
    assert np.var(products) < variance * (1 + 4 * np.sqrt(2 / seeds))


def test_precision_follows_the_gradients():
    assert (
        CountSketch(4, 0).project("w", torch.ones(1, 9, dtype=torch.float64)).dtype == torch.float64
    )
    assert CountSketch(4, 0).project("w", torch.ones(1, 9)).dtype == torch.float32


def test_a_projection_to_less_than_two_numbers_is_refused():
    with pytest.raises(ValueError, match="projection_dim must be an int of at least 2, got 1"):
        CountSketch(1, 0)
