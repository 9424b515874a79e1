"""A contraction with a constant is a linear layer, however it is written, and none is missing from the work."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcgraph.capture.capture import capture
from qcgraph.ir.structure import find_sites
from qcgraph.plan.spec import ModelSpec

pytestmark = pytest.mark.slow  # many captures and exports, each short
IN, OUT, TOKENS = 8, 6, 16
SPEC = ModelSpec.class_conditional("toy", (IN, 4, 4), 3, 3, output_channels=IN)
NAMES = ("x", "t", "y")
Contraction = Callable[[nn.Module, Tensor], Tensor]


def denoiser(contract: Contraction) -> nn.Module:
    """[B,16,8] tokens go through a linear layer, what is tested, [B,16,6], and another linear layer."""

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(IN, IN), nn.Linear(OUT, IN)
            sizes = {
                "W": (IN, OUT),
                "V": (OUT, IN),
                "bias": (OUT,),
                "heads": (IN, 2, 3),
                "joined": (2, 4, OUT),
                "gain": (OUT, 1),
            }
            for name, size in sizes.items():
                self.register_parameter(name, nn.Parameter(torch.randn(size)))
            self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(IN, OUT))

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            tokens = self.first(x.flatten(2).transpose(1, 2)).relu()
            return self.last(contract(self, tokens).relu()).transpose(1, 2).unflatten(2, (4, 4))

    torch.manual_seed(0)
    return Toy().eval().requires_grad_(False)


LINEAR: dict[str, Contraction] = {
    "transposed": lambda self, x: F.linear(x, self.W.t()),
    "scaled": lambda self, x: F.linear(x, self.V * self.gain, self.bias + 1),
    "weight norm": lambda self, x: self.normed(x),
    "computed bias": lambda self, x: F.linear(x, self.V, self.bias * x.mean()),
    "at": lambda self, x: x @ self.W + self.bias,
    "constant first": lambda self, x: (self.V @ x.transpose(1, 2)).transpose(1, 2),
    "mm": lambda self, x: torch.mm(x.reshape(-1, IN), self.W).view(-1, TOKENS, OUT),
    "addmm": lambda self, x: torch.addmm(self.bias, x.reshape(-1, IN), self.W, beta=2, alpha=0.5).view(-1, TOKENS, OUT),
    "bmm": lambda self, x: torch.bmm(x, self.W.expand(x.shape[0], -1, -1)),
    "baddbmm": lambda self, x: torch.baddbmm(self.bias, x, self.W[None].repeat(x.shape[0], 1, 1)),
    "einsum": lambda self, x: torch.einsum("btc,co->bto", x, self.W),
    "einsum, transposed": lambda self, x: torch.einsum("btc, oc -> bto", x, self.V),
    "einsum, ellipsis": lambda self, x: torch.einsum("...c,co->...o", x, self.W),
    "einsum, constant first": lambda self, x: torch.einsum("oc,btc->bto", self.V, x),
    "einsum, no result": lambda self, x: torch.einsum("abd,dz", x, self.W),
    "einsum, channels first": lambda self, x: torch.einsum("bct,co->bto", x.transpose(1, 2), self.W),
    "einsum, to heads": lambda self, x: torch.einsum("btc,chd->bhtd", x, self.heads).transpose(1, 2).flatten(2),
    "einsum, of heads": lambda self, x: torch.einsum("bthc,hco->bto", x.unflatten(-1, (2, 4)), self.joined),
    "tensordot": lambda self, x: torch.tensordot(x, self.W, dims=1),
    "tensordot, constant first": lambda self, x: torch.tensordot(self.W, x, dims=([0], [2])).permute(1, 2, 0),
    "inner": lambda self, x: torch.inner(x, self.V),
    "conv1d": lambda self, x: F.conv1d(x.transpose(1, 2), self.V[:, :, None], self.bias).transpose(1, 2),
    "conv2d": lambda self, x: F.conv2d(x.transpose(1, 2)[..., None], self.V[:, :, None, None])[..., 0].transpose(1, 2),
}
OTHER: dict[str, tuple[Contraction, str, int]] = {
    "3x3 convolution": (
        lambda self, x: F.conv1d(x.transpose(1, 2), self.V[:, :, None].repeat(1, 1, 3), padding=1).transpose(1, 2),
        "conv1d",
        TOKENS * IN * OUT * 3,
    ),
    "transposed convolution": (
        lambda self, x: F.conv_transpose1d(x.transpose(1, 2), self.W[:, :, None]).transpose(1, 2),
        "conv_transpose1d",
        TOKENS * IN * OUT,
    ),
    "a matrix for every head": (
        lambda self, x: torch.einsum("bthc,hco->btho", x.unflatten(-1, (2, 4)), self.joined).sum(2),
        "einsum",
        TOKENS * IN * OUT,
    ),
    "bilinear": (
        lambda self, x: F.bilinear(x, x, self.V[:, None] * self.V[:, :, None]),
        "bilinear",
        TOKENS * IN * IN * OUT,
    ),
    "activations": (
        lambda self, x: torch.einsum("btc,bsc->bts", x, x)[..., :OUT],
        "einsum",
        TOKENS * TOKENS * IN,
    ),
    "activations, added": (
        lambda self, x: torch.baddbmm(x[..., :1], x, x.transpose(1, 2))[..., :OUT],
        "matmul",
        TOKENS * TOKENS * IN,
    ),
}


def compare(module: nn.Module, batch: int) -> None:
    program = capture(module, SPEC, NAMES)
    inputs = {
        "latent": torch.randn(batch, IN, 4, 4),
        "timestep": torch.zeros(batch),
        "class_label": torch.zeros(batch, dtype=torch.int64),
    }
    found = program.run("main", inputs)["noise_prediction"]
    torch.testing.assert_close(found, module(*inputs.values()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LINEAR)
def test_it_is_one_linear_layer(name: str) -> None:
    module = denoiser(LINEAR[name])
    sites = find_sites(capture(module, SPEC, NAMES).variants["main"])
    assert [(site.kind, site.weight_shape) for site in sites] == [
        ("linear", shape) for shape in ((IN, IN), (OUT, IN), (IN, OUT))
    ]
    assert [bool(site.refusal) for site in sites] == [True, False, True]
    assert sites[1].macs == TOKENS * IN * OUT
    compare(module, batch=2)


@pytest.mark.parametrize("name", OTHER)
def test_what_is_none_is_counted(name: str) -> None:
    contract, kind, macs = OTHER[name]
    module = denoiser(contract)
    site = find_sites(capture(module, SPEC, NAMES).variants["main"])[1]
    assert (site.kind, site.macs) == (kind, macs)
    assert "not a linear layer" in site.refusal
    compare(module, batch=2)


def test_one_constant_in_several_forms() -> None:
    def contract(self: nn.Module, x: Tensor) -> Tensor:
        return x @ self.W + x @ (self.W * 2) + F.linear(x, self.W.t())

    module = denoiser(contract)
    sites = find_sites(capture(module, SPEC, NAMES).variants["main"])
    assert sum(not site.refusal for site in sites) == 3
    compare(module, batch=3)


def test_an_einsum_that_only_moves_values_is_no_work() -> None:
    module = denoiser(lambda self, x: torch.einsum("btc->bct", x).transpose(1, 2)[..., :OUT])
    assert len(find_sites(capture(module, SPEC, NAMES).variants["main"])) == 2


def test_sixteen_bits_stay_as_they_are() -> None:
    """A model that computes in 16 bits somewhere, as under autocast, is not quantized there."""
    module = denoiser(lambda self, x: (x.bfloat16() @ self.W.bfloat16()).float())
    site = find_sites(capture(module, SPEC, NAMES).variants["main"])[1]
    assert site.refusal == "multiplies bf16, not f32"
