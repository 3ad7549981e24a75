"""Divergences against what can be worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.numerics import divergence


def logits(seed: int, tokens: int = 7, vocabulary: int = 50) -> torch.Tensor:
    return torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed)) * 4


def test_kl_of_a_coin() -> None:
    coins = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    found = divergence.kl_divergence(coins, coins.flip(0))
    want = [
        0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1),
        0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5),
    ]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(want, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), shift=st.floats(-50, 50))
def test_kl_is_positive_and_blind_to_a_shift_of_the_logits(seed: int, shift: float) -> None:
    reference, other = logits(seed).double(), logits(seed + 1000).double()
    found = divergence.kl_divergence(reference, other)
    assert bool((found > 0).all())
    torch.testing.assert_close(divergence.kl_divergence(reference + shift, other), found)
    assert float(divergence.kl_divergence(reference, reference + shift).abs().max()) < 1e-12


def test_a_tiny_kl_is_not_lost_to_float32() -> None:
    """To second order KL is half the variance of the difference under the reference: here about 1e-12."""
    reference = logits(1).double()
    difference = 1e-6 * logits(2).double()
    p = reference.softmax(-1)
    variance = (p * difference**2).sum(-1) - (p * difference).sum(-1) ** 2
    found = divergence.kl_divergence(reference, reference + difference)
    torch.testing.assert_close(found, variance / 2, rtol=1e-3, atol=0)


def test_impossible_tokens() -> None:
    reference, other = logits(3), logits(4)
    masked = reference.clone()
    masked[:, 10:] = -math.inf
    also = other.clone()
    also[:, 10:] = -math.inf
    alone = divergence.kl_divergence(reference[:, :10], other[:, :10])
    torch.testing.assert_close(divergence.kl_divergence(masked, also), alone)
    assert bool(divergence.kl_divergence(masked, other).isfinite().all())
    assert bool((divergence.kl_divergence(reference, also) == math.inf).all())


def test_nan_is_not_hidden() -> None:
    broken = logits(5)
    broken[2, 3] = math.nan
    for found in (divergence.kl_divergence(logits(5), broken), divergence.kl_divergence(broken, logits(5))):
        assert found.isnan().tolist() == [False, False, True, False, False, False, False]
    assert math.isnan(divergence.sqnr_db(logits(5), broken))


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, other, targets = logits(6), logits(7), torch.arange(7)
    kl = divergence.kl_divergence(reference, other)
    nll = divergence.negative_log_likelihood(other, targets)
    ratio = divergence.sqnr_db(reference, other)
    monkeypatch.setattr(divergence, "ELEMENTS_AT_A_TIME", 110)
    assert torch.equal(divergence.kl_divergence(reference, other), kl)
    assert torch.equal(divergence.negative_log_likelihood(other, targets), nll)
    assert divergence.sqnr_db(reference, other) == pytest.approx(ratio, rel=1e-12)


def test_agreement_counts_the_same_first_choice() -> None:
    reference = torch.tensor([[1.0, 2.0, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    other = torch.tensor([[0.0, 9.0, 1.0], [0.0, 1.0, 0.0], [5.0, 0.0, 6.0]])
    assert divergence.top1_agreement(reference, other).tolist() == [True, False, True]


def test_likelihood_of_a_uniform_guess_is_the_logarithm_of_the_vocabulary() -> None:
    found = divergence.negative_log_likelihood(torch.full((3, 32), 7.0), torch.tensor([0, 5, 31]))
    assert found.tolist() == pytest.approx([math.log(32)] * 3)
    two = torch.tensor([[0.25, 0.75]]).log()
    assert divergence.negative_log_likelihood(two, torch.tensor([1])).item() == pytest.approx(-math.log(0.75), rel=1e-6)


def test_wilson_bound_of_published_cases() -> None:
    """Newcombe 1998 (Statistics in Medicine 17, table I), score intervals at 95 %."""
    cases = [(81, 263, 0.2553), (15, 148, 0.0624), (0, 20, 0.0), (1, 29, 0.0061)]
    for successes, trials, lower in cases:
        assert divergence.wilson_lower_bound(successes, trials) == pytest.approx(lower, abs=5e-5)
    assert divergence.wilson_lower_bound(0, 0) == 0.0


@settings(max_examples=60, deadline=None)
@given(trials=st.integers(1, 10**6), share=st.floats(0, 1))
def test_wilson_bound_solves_the_score_equation(trials: int, share: float) -> None:
    successes = round(share * trials)
    bound = divergence.wilson_lower_bound(successes, trials)
    observed = successes / trials
    assert 0 <= bound <= observed
    assert observed - bound == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / trials), abs=1e-9)


@pytest.mark.parametrize("count", [8, 32])
def test_bootstrap_interval_covers_the_mean_as_often_as_it_says(count: int) -> None:
    """Skewed values, as KL has them, of known mean: about one interval in twenty may miss it."""
    generator = torch.Generator().manual_seed(5)
    samples = torch.randn(400, count, generator=generator).mul(0.5).exp()
    mean = math.exp(0.125)
    found = [divergence.bootstrap_interval(values, resamples=1000) for values in samples]
    missed = sum(not low <= mean <= high for low, high in found) / len(found)
    assert 0.01 <= missed <= 0.10


def test_bootstrap_interval_of_little() -> None:
    assert divergence.bootstrap_interval(torch.tensor([1.0])) == (-math.inf, math.inf)
    assert divergence.bootstrap_interval(torch.tensor([1.0, 2.0])) == (-math.inf, math.inf)
    assert divergence.bootstrap_interval(torch.full((5,), 2.0)) == (2, 2)
    values = torch.randn(16, generator=torch.Generator().manual_seed(6))
    low, high = divergence.bootstrap_interval(values)
    assert low < float(values.mean()) < high
    assert divergence.bootstrap_interval(values) == (low, high)


def test_sqnr_in_decibels() -> None:
    x = logits(8)
    assert divergence.sqnr_db(x, x) == math.inf
    assert divergence.sqnr_db(x, x * 0.9) == pytest.approx(20, abs=1e-4)
    assert divergence.sqnr_db(x, torch.zeros_like(x)) == pytest.approx(0)
    assert divergence.sqnr_db(x.t(), x.t() * 0.99) == pytest.approx(40, abs=1e-3)
