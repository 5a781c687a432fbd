"""Norms, gates, rotations, log-softmax and the draw of tokens in Triton against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.engine.tiny import relative

pytest.importorskip("triton")
from tinsmith.engine.commands import SampleParams
from tinsmith.engine.kernels import triton_elementwise as kernel
from tinsmith.engine.kernels import triton_sampling
from tinsmith.engine.sampling import choose

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEAR = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
ROWS, WIDTH = 37, 80


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("style", [0, 1, 2])
def test_norm(dtype: torch.dtype, style: int) -> None:
    x, w = random(ROWS, WIDTH, dtype=dtype), random(WIDTH, seed=1, dtype=dtype)
    grad, inverse = random(ROWS, WIDTH, seed=2, dtype=dtype), torch.empty(ROWS, device=DEVICE)
    y = kernel.norm(x, w, 1e-5, style, inverse)
    leaf = x.double().requires_grad_()
    expected = leaf * (leaf.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * (w.double() + (style == 2))
    expected.backward(grad.double())
    assert leaf.grad is not None
    assert relative(y.cpu(), expected.detach().cpu()) < NEAR[dtype]
    assert relative(kernel.norm_backward(x, w, grad, inverse, style).cpu(), leaf.grad.cpu()) < NEAR[dtype]
    assert torch.equal(kernel.norm(x[5:6], w, 1e-5, style, None), y[5:6])


def test_gate(dtype: torch.dtype) -> None:
    x, up, grad = (random(ROWS, WIDTH, seed=i, dtype=dtype) for i in range(3))
    a, b = x.double().requires_grad_(), up.double().requires_grad_()
    expected = F.silu(a) * b
    expected.backward(grad.double())
    assert relative(kernel.gate(x, up).cpu(), expected.detach().cpu()) < NEAR[dtype]
    for mine, leaf in zip(kernel.gate_backward(x, up, grad), (a, b), strict=True):
        assert leaf.grad is not None
        assert relative(mine.cpu(), leaf.grad.cpu()) < NEAR[dtype]


@pytest.mark.parametrize(("dim", "rotary", "width"), [(32, 32, 32), (48, 32, 32), (32, 32, 16)])
def test_rotation(dtype: torch.dtype, dim: int, rotary: int, width: int) -> None:
    x, grad = random(3, ROWS, dim, dtype=dtype), random(3, ROWS, dim, seed=1, dtype=dtype)
    cos, sin = (random(ROWS, width, seed=i, dtype=dtype) for i in (2, 3))
    wide = [torch.cat([t, t], -1).double() if width < rotary else t.double() for t in (cos, sin)]
    leaf, half = x.double().requires_grad_(), rotary // 2
    turned = leaf[..., :rotary]
    other = torch.cat([-turned[..., half:], turned[..., :half]], -1)
    expected = torch.cat([turned * wide[0] + other * wide[1], leaf[..., rotary:]], -1)
    expected.backward(grad.double())
    assert leaf.grad is not None
    mine = kernel.rotate(x, cos, sin, rotary, back=False).transpose(0, 1)
    back = kernel.rotate(grad, cos, sin, rotary, back=True).transpose(0, 1)
    assert relative(mine.cpu(), expected.detach().cpu()) < NEAR[dtype]
    assert relative(back.cpu(), leaf.grad.cpu()) < NEAR[dtype]


def test_log_softmax_its_gradient_and_temperatures(dtype: torch.dtype) -> None:
    x, ids = 3 * random(5, 5000, dtype=dtype), torch.randint(0, 5000, (5, 2), device=DEVICE)
    grads, temperatures = random(5, 2, seed=1), torch.tensor([1.0, 0.5, 2.0, 1.0, 0.7], device=DEVICE)
    leaf = x.double().requires_grad_()
    table = leaf.log_softmax(-1)
    (table.gather(1, ids) * grads).sum().backward()
    assert leaf.grad is not None
    ours = kernel.LogSoftmax(x)
    assert relative(ours.table().cpu(), table.detach().cpu()) < 1e-6
    assert torch.equal(ours.gather(ids), ours.table().gather(1, ids))
    scaled = kernel.LogSoftmax(x, temperatures)
    expected = (x.double() / temperatures[:, None]).log_softmax(-1)
    assert relative(scaled.table().cpu(), expected.cpu()) < 1e-6
    assert torch.equal(scaled.gather(ids)[0], ours.gather(ids)[0]), "a temperature of 1 changes no bit"
    assert relative(ours.gradient(ids, grads).cpu(), leaf.grad.cpu()) < NEAR[dtype]


class TestChoice:
    """The tokens that sampling.choose keeps, in the shares that they have."""

    VOCAB = 600  # more than a block of the interpreter

    def draw(self, logits: Tensor, temperature: float, k: int, p: float, n: int) -> list[int]:
        draws = torch.from_numpy((np.arange(n) + 0.5) / n).to(DEVICE)
        return triton_sampling.choose(
            logits,
            torch.ones(n, dtype=torch.int64, device=DEVICE),
            torch.full((n,), temperature, device=DEVICE),
            torch.full((n,), k, dtype=torch.int32, device=DEVICE),
            torch.full((n,), p, device=DEVICE),
            draws,
        ).tolist()

    @pytest.mark.parametrize(
        ("temperature", "k", "p", "dtype"),
        [
            (0.0, 0, 1.0, torch.bfloat16),
            (1.0, -1, 1.0, torch.float32),
            (0.7, 5, 1.0, torch.float32),
            (1.0, 0, 0.5, torch.bfloat16),
            (1.3, 9, 0.5, torch.bfloat16),
            (1.0, 1, 0.3, torch.bfloat16),
            (1.0, 0, 0.01, torch.bfloat16),
        ],
    )
    def test_keeps_what_the_plain_path_keeps(
        self, temperature: float, k: int, p: float, dtype: torch.dtype
    ) -> None:
        logits = 3 * random(2, self.VOCAB, dtype=dtype)
        logits[1, [7, 9, 11]] = logits[1].max()  # ties
        params, n = SampleParams(0, temperature=temperature, top_k=k, top_p=p), 8
        ours = self.draw(logits, temperature, k, p, n)
        scaled = (logits[1:].float() / (temperature or 1.0)).cpu()
        if k <= 0 and p == 1:
            assert ours == choose(scaled.expand(n, -1), [params] * n, (np.arange(n) + 0.5) / n)
            return
        # Theirs draw from the sorted tokens, ours in order of the ids; what is kept is the same, and its
        # shares.
        many = 4000
        theirs = np.array(choose(scaled.expand(many, -1), [params] * many, (np.arange(many) + 0.5) / many))
        kept, counts = np.unique(theirs, return_counts=True)
        at = np.searchsorted(np.cumsum(counts), (np.arange(n) + 0.5) / n * many)
        assert ours == kept[at].tolist()

    def test_a_draw_at_the_very_end_gives_a_token_with_weight(self) -> None:
        logits = torch.full((2, self.VOCAB), float("-inf"), device=DEVICE)
        logits[:, 3], logits[:, 5] = 1.0, 0.0
        one = torch.ones(1, device=DEVICE)
        token = triton_sampling.choose(
            logits,
            one.long(),
            one,
            one.int() * 0,
            one,
            torch.tensor([1.0], dtype=torch.float64, device=DEVICE),
        )
        assert token.tolist() == [5]
