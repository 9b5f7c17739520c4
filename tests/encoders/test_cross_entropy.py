"""The blocked loss against torch's own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from userllm.encoders.cross_entropy import blocked_cross_entropy


def both(hidden, table, target, rows, factor=1.0):
    results = []
    for loss_of in (
        lambda h, t: blocked_cross_entropy(h, t, target, rows),
        lambda h, t: F.cross_entropy(h @ t.T, target),
    ):
        h, t = hidden.clone().requires_grad_(), table.clone().requires_grad_()
        loss = loss_of(h, t)
        (factor * loss).backward()
        results.append((loss.detach(), h.grad, t.grad))
    return results


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 9), st.integers(0, 999))
def test_value_and_both_gradients(count, size, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 6, generator=generator, dtype=torch.double)
    table = torch.randn(size, 6, generator=generator, dtype=torch.double)
    target = torch.randint(size, (count,), generator=generator)
    mine, theirs = both(hidden, table, target, rows, factor=-2.5)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, check_dtype=False, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_targets_of_vanishing_probability_are_exact_too(size):
    hidden, table = torch.randn(50, 8) * size, torch.randn(40, 8) * size
    target = torch.randint(40, (50,))
    mine, theirs = both(hidden, table, target, 16)
    assert size == 1 or theirs[0] > 100  # beyond what a float32 probability can hold
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_products_in_bfloat16_are_close():
    torch.manual_seed(1)
    hidden, table, target = torch.randn(300, 32), torch.randn(200, 32) * 32**-0.5, torch.randint(200, (300,))
    results = []
    for precision in (torch.float32, torch.bfloat16):
        h, t = hidden.clone().requires_grad_(), table.clone().requires_grad_()
        loss = blocked_cross_entropy(h, t, target, 64, precision)
        loss.backward()
        assert loss.dtype == h.grad.dtype == t.grad.dtype == torch.float32
        results.append((loss.detach(), h.grad, t.grad))
    torch.testing.assert_close(*(r[0] for r in results), rtol=1e-3, atol=0)
    for exact, rounded in zip(results[0][1:], results[1][1:], strict=True):
        assert not torch.equal(exact, rounded)
        assert float((rounded - exact).norm() / exact.norm()) < 1e-2


def test_nothing_to_predict_is_zero():
    hidden, table = torch.randn(0, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    loss = blocked_cross_entropy(hidden, table, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not table.grad.any()


def test_without_gradients():
    hidden, table, target = torch.randn(5, 4), torch.randn(7, 4), torch.randint(7, (5,))
    with torch.no_grad():
        torch.testing.assert_close(
            blocked_cross_entropy(hidden, table.requires_grad_(), target),
            F.cross_entropy(hidden @ table.T, target),
        )
