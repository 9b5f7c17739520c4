"""Products in bfloat16 on a processor that has none: the numbers of one that has."""

import pytest
import torch
from torch import nn

from userllm import bfloat16
from userllm.encoders.cross_entropy import blocked_cross_entropy
from userllm.language_models.products import Bfloat16Linear

ULP = 2**-7
"""Two roundings of nearly the same number may differ by one step of bfloat16."""


@pytest.fixture
def on_both(monkeypatch):
    """Runs something as on a processor with bfloat16 and as on one without; torch has (slow) kernels everywhere."""

    def run(do):
        results = []
        for able in (True, False):
            monkeypatch.setattr(bfloat16, "_cpu_multiplies", lambda able=able: able)
            torch.manual_seed(0)
            results.append(do())
        return results

    return run


@pytest.mark.parametrize("frozen", [True, False])
def test_a_linear_layer(on_both, frozen):
    def do():
        layer = Bfloat16Linear(nn.Linear(96, 48)).requires_grad_(not frozen)
        x = torch.randn(20, 96, requires_grad=True)
        out = layer(x)
        assert out.dtype == torch.float32
        assert torch.equal(out, out.bfloat16().float())  # rounded once more, as the hardware does
        out.square().sum().backward()
        return [out, x.grad, *(weight.grad for weight in layer.parameters() if not frozen)]

    for native, emulated in zip(*on_both(do), strict=True):
        torch.testing.assert_close(
            emulated, native, rtol=2 * ULP, atol=2 * ULP * float(native.detach().abs().mean())
        )
        assert (emulated != native).float().mean() < 0.1


def test_operands_are_multiplied_in_float32_where_bfloat16_has_no_instructions(on_both):
    x = torch.randn(3, 4)
    native, emulated = on_both(lambda: bfloat16.operand(x))
    assert (native.dtype, emulated.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(native.float(), emulated)
    assert bfloat16.operand(x, torch.float32) is x


def test_the_cross_entropy_over_a_catalogue(on_both):
    def do():
        hidden, table = torch.randn(70, 32, requires_grad=True), torch.randn(50, 32, requires_grad=True)
        loss = blocked_cross_entropy(hidden, table, torch.arange(70) % 50, 16, torch.bfloat16)
        loss.backward()
        return [loss, hidden.grad, table.grad]

    for native, emulated in zip(*on_both(do), strict=True):
        torch.testing.assert_close(
            emulated, native, rtol=4 * ULP, atol=4 * ULP * float(native.detach().abs().mean())
        )
