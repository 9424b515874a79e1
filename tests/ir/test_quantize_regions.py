"""Two steps in one integer tensor: the codes of qcgraph::quantize_regions, here and in ONNX Runtime, and its rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qcgraph.errors import ContractError
from qcgraph.facts import ActivationQuant
from qcgraph.ir import legality
from qcgraph.ir.edit import GraphEditor, with_edits
from qcgraph.ir.ops import OPS
from qcgraph.ir.program import Program
from qcgraph.passes.quantization._scale_search import Histogram, score_of_planes

aten = torch.ops.aten
ops = torch.ops.qcgraph
INFINITY = float("inf")


@dataclass(frozen=True)
class Codes:
    """Codes of two regions, or of one with a shift of 0."""

    low: int
    zero: int
    high: int
    shift: int
    dtype: torch.dtype

    def quantize(self, x: Tensor, scale: Tensor) -> Tensor:
        zero = torch.full(scale.shape, self.zero, dtype=self.dtype)
        found: Tensor = ops.quantize_regions(x, scale, zero, self.low, self.high, self.shift, 0)
        return found

    def dequantize(self, q: Tensor, scale: Tensor) -> Tensor:
        found: Tensor = ops.dequantize(q, scale, torch.full(scale.shape, self.zero, dtype=self.dtype), 0)
        return found


UNSIGNED = Codes(0, 31, 155, 2, torch.uint8)  # of 6 bits, as search-scales plans them
KINDS = {
    "6": UNSIGNED,
    "6 near": Codes(0, 31, 93, 1, torch.uint8),
    "7": Codes(0, 63, 189, 1, torch.uint8),
    "3": Codes(0, 3, 195, 6, torch.uint8),
    "6 signed": Codes(-31, 0, 124, 2, torch.int8),
    "7 signed": Codes(-63, 0, 126, 1, torch.int8),
}
every_kind = pytest.mark.parametrize("codes", KINDS.values(), ids=KINDS)


def critical(codes: Codes, scale: Tensor) -> Tensor:
    """Multiples of half a step of either region, what is next to them, and what no code can hold."""
    found = []
    for step in (scale, scale * 2.0**codes.shift):
        halves = 0.5 * torch.arange(2 * (codes.low - codes.zero) - 5, 2 * (codes.high - codes.zero) + 6) * step
        found += [halves, torch.nextafter(halves, torch.tensor(9e9)), torch.nextafter(halves, torch.tensor(-9e9))]
    ends = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e30, -1e30, 3e38, -3e38, INFINITY, -INFINITY])
    noise = 40 * scale * torch.randn(500, generator=torch.Generator().manual_seed(0))
    return torch.cat([*found, ends, noise])


def scales(count: int) -> list[Tensor]:
    return [torch.tensor(value) for value in np.random.default_rng(0).uniform(1e-4, 0.1, count).astype(np.float32)]


@pytest.mark.parametrize("kind", [(0, 100, 255, torch.uint8), (0, 31, 93, torch.uint8), (-128, 0, 127, torch.int8)])
def test_without_a_shift_it_is_quantize(kind: tuple[int, int, int, torch.dtype]) -> None:
    low, zero, high, dtype = kind
    codes, zero_point = Codes(low, zero, high, 0, dtype), torch.tensor(zero, dtype=dtype)
    for scale in scales(20):
        x = critical(codes, scale)
        assert torch.equal(codes.quantize(x, scale), ops.quantize(x, scale, zero_point, low, high, 0))


def test_by_hand() -> None:
    """A fine step of 1/2 below zero and a coarse one of 2 above; halves go to the even number."""
    x = torch.tensor([-99.0, -0.75, -0.5, -0.25, 0.0, 0.9, 1.0, 1.1, 3.0, 5.0, 61.9, 99.0])
    q = UNSIGNED.quantize(x, torch.tensor(0.5))
    assert q.dtype == torch.uint8
    assert (q.long() - 31).tolist() == [-31, -2, -1, 0, 0, 0, 0, 4, 8, 8, 124, 124]
    back = [-15.5, -1.0, -0.5, 0.0, 0.0, 0.0, 0.0, 2.0, 4.0, 4.0, 62.0, 62.0]
    assert UNSIGNED.dequantize(q, torch.tensor(0.5)).tolist() == back


@every_kind
def test_the_regions_share_zero_alone(codes: Codes) -> None:
    for scale in scales(5):
        x = critical(codes, scale)
        q = codes.quantize(x, scale).long() - codes.zero
        assert (q[x <= 0] <= 0).all()
        assert (q[x >= 0] >= 0).all()
        assert (q[x >= 0] % 2**codes.shift == 0).all()
        assert (q.min(), q.max()) == (codes.low - codes.zero, codes.high - codes.zero)


@every_kind
def test_each_region_has_as_many_codes(codes: Codes) -> None:
    """2^(bits - 1) - 1 besides zero: one of the bits says which region it is."""
    levels = codes.zero - codes.low
    found = codes.quantize(critical(codes, torch.tensor(0.01)), torch.tensor(0.01)).unique()
    assert len(found) == 2 * levels + 1
    assert (levels + 1).bit_count() == 1


@every_kind
def test_each_region_has_an_error_of_half_its_step(codes: Codes) -> None:
    for scale in scales(5):
        coarse = scale * 2**codes.shift
        for step, end in ((scale, (codes.low - codes.zero) * scale), (coarse, (codes.high - codes.zero) * scale)):
            x = torch.linspace(0, 1, 5001) * end
            error = codes.dequantize(codes.quantize(x, scale), scale) - x
            assert error.abs().max() <= 0.5 * step * (1 + 1e-4)
            assert error.abs().max() > 0.49 * step
            beyond = codes.dequantize(codes.quantize(3 * end.reshape(1), scale), scale)
            torch.testing.assert_close(beyond, end.reshape(1), rtol=1e-6, atol=0)


@every_kind
def test_what_it_gives_is_a_fixed_point(codes: Codes) -> None:
    for scale in scales(5):
        q = codes.quantize(critical(codes, scale), scale)
        assert torch.equal(codes.quantize(codes.dequantize(q, scale), scale), q)


@every_kind
@pytest.mark.parametrize("middle", [(), (3,), (3, 5)])
def test_rows_with_scales_of_their_own(codes: Codes, middle: tuple[int, ...]) -> None:
    several = torch.stack(scales(4))
    x = 0.5 * torch.randn(4, *middle, 50, generator=torch.Generator().manual_seed(0))
    together = codes.quantize(x, several)
    assert torch.equal(together, torch.stack([codes.quantize(*pair) for pair in zip(x, several, strict=True)]))
    zeros = torch.tensor([codes.zero] * 4, dtype=codes.dtype)
    zeros[1] += 1
    other = ops.quantize_regions(x, several, zeros, codes.low, codes.high, codes.shift, 0)
    assert torch.equal(other[[0, 2, 3]], together[[0, 2, 3]])
    assert not torch.equal(other[1], together[1])


def test_scales_go_along_their_axis() -> None:
    x, several = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.stack(scales(4))
    zeros = torch.full((4,), 31, dtype=torch.uint8)
    found = ops.quantize_regions(x, several, zeros, 0, 155, 2, 1)
    assert torch.equal(found, ops.quantize_regions(x.t(), several, zeros, 0, 155, 2, 0).t())


def test_nothing_that_was_given_is_written_to() -> None:
    x = critical(UNSIGNED, torch.tensor(0.01))
    before = x.clone()
    UNSIGNED.quantize(x, torch.tensor(0.01))
    assert torch.equal(x, before)


@pytest.mark.parametrize("scale", [torch.tensor(0.1), torch.rand(2) + 0.1])
def test_the_fake_rule_agrees_with_the_kernel(scale: Tensor) -> None:
    zero = torch.full(scale.shape, 31, dtype=torch.uint8)
    torch.library.opcheck(
        ops.quantize_regions.default,
        (torch.randn(2, 3), scale, zero, 0, 155, 2, 0),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
    )


class Quantizing(nn.Module):
    """One output for every kind of codes."""

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return tuple(codes.quantize(x, scale) for codes in KINDS.values())


@pytest.fixture(scope="module")
def session() -> Any:
    import onnxruntime

    rows = {"x": {0: torch.export.Dim("rows")}, "scale": None}
    exported: Any = torch.onnx.export(
        torch.export.export(Quantizing(), (torch.randn(7), torch.tensor(0.1)), dynamic_shapes=rows),
        dynamo=True,
        opset_version=23,
        custom_translation_table={op.target: op.to_onnx for op in OPS},
        verbose=False,
    )
    return onnxruntime.InferenceSession(exported.model_proto.SerializeToString())


def test_onnx_runtime_gives_the_same_codes(session: Any) -> None:
    """All of them, with the halves of both steps, what is next to those, and the limits."""
    names = [item.name for item in session.get_inputs()]
    for scale in scales(30):
        x = torch.cat([critical(codes, scale) for codes in KINDS.values()])
        found = session.run(None, dict(zip(names, (x.numpy(), scale.numpy()), strict=True)))
        for q, codes in zip(found, KINDS.values(), strict=True):
            np.testing.assert_array_equal(q, codes.quantize(x, scale).numpy())


Edit = Callable[[GraphEditor, fx.Node], None]
SCALE, ZERO = torch.tensor(0.1), torch.tensor(31, dtype=torch.uint8)


def regions(
    scale: Tensor = SCALE, zero: Tensor = ZERO, low: int = 0, high: int = 155, shift: Any = 2, back: Tensor = SCALE
) -> Edit:
    """Quantize what enters a linear layer in two regions, and dequantize it with another scale."""

    def edit(editor: GraphEditor, linear: fx.Node) -> None:
        with editor.before(linear):
            parameters = [editor.constant("s", scale, linear), editor.constant("z", zero, linear)]
            q = editor.graph.create_node(
                "call_function",
                ops.quantize_regions.default,
                (linear.args[0], *parameters, low, high, shift, 0),
                name="quantize_regions",
            )
            q.meta["val"] = torch.empty_like(linear.args[0].meta["val"], dtype=zero.dtype)  # type: ignore[union-attr]
            q.meta["nn_module_stack"] = linear.meta["nn_module_stack"]
            other = editor.constant("s" if back is scale else "other", back, linear)
            linear.args = (
                editor.call(ops.dequantize.default, q, other, parameters[1], 0, source=linear),
                *linear.args[1:],
            )

    return edit


def edited(program: Program, edit: Edit) -> Program:
    """The program after an edit at its first linear layer on tokens."""
    editor = GraphEditor(program.variants["main"], program.constants, "test")
    linears = [node for node in editor.graph.nodes if node.target is aten.linear.default]
    edit(editor, next(node for node in linears if node.meta["val"].dim() == 3))
    return with_edits(program, {"main": editor})


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_two_regions_are_legal(captured: Program, shift: int) -> None:
    legality.verify(edited(captured, regions(shift=shift)))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (regions(shift=-1), r"a coarse step of 2\^-1 fine ones"),
        (regions(shift=0.5), r"a coarse step of 2\^0.5 fine ones"),
        (regions(zero=torch.tensor(0, dtype=torch.int32)), "zero point is torch.int32"),
        (regions(scale=torch.tensor([0.1, 0.1])), "differ in shape"),
        (regions(high=256), "do not fit torch.uint8"),
        (regions(low=155), "do not fit torch.uint8"),
        (regions(scale=torch.tensor(0.0), back=torch.tensor(0.0)), "holds a value that is not positive and finite"),
    ],
)
def test_what_is_illegal(captured: Program, edit: Edit, reason: str) -> None:
    with pytest.raises(ContractError, match=reason) as caught:
        legality.verify(edited(captured, edit))
    assert "blocks.0.attn.qkv" in str(caught.value.where)


def test_its_own_scale_has_to_be_positive(captured: Program) -> None:
    with pytest.raises(ContractError, match="scale s holds a value that is not positive"):
        legality.verify(edited(captured, regions(scale=torch.tensor(0.0))))


def test_codes_do_not_escape(captured: Program) -> None:
    def escape(editor: GraphEditor, linear: fx.Node) -> None:
        regions()(editor, linear)
        q = next(node for node in editor.graph.nodes if node.target is ops.quantize_regions.default)
        with editor.after(q):
            stray = editor.call(aten.to.dtype, q, torch.float32, source=q)
        linear.args = (stray, *linear.args[1:])

    with pytest.raises(ContractError, match="without a dequantize"):
        legality.verify(edited(captured, escape))


@pytest.fixture(scope="module")
def after_gelu() -> Tensor:
    """What a GELU gives for N(0, 2^2)."""
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    return F.gelu(2 * normal, approximate="tanh")


def error_below_zero(values: Tensor, back: Tensor) -> float:
    return float((back - values)[values < 0].double().square().mean())


def test_the_negative_part_needs_a_step_of_its_own(after_gelu: Tensor) -> None:
    """At 8 bits a mean squared error of 4e-4 with one symmetric step, 1.4e-7 with a step of 0.17 / 127."""
    step = after_gelu.max() / 127
    zero = torch.tensor(0, dtype=torch.int8)
    back = ops.dequantize(ops.quantize(after_gelu, step, zero, -128, 127, 0), step, zero, 0)
    assert error_below_zero(after_gelu, back) == pytest.approx(3.9e-4, rel=0.25)
    # Of the negative values alone: in a histogram of all, a bin would be wider than a step.
    below = after_gelu[None, after_gelu < 0]
    histogram = Histogram([(float(below.min()), 0.0)])
    histogram.add(below, torch.ones_like(below), torch.tensor([0]))
    quant = ActivationQuant(scales=(1.0,), zero_points=(0,), low=0, high=255, dtype="uint8")
    assert score_of_planes(histogram, 0, quant) / below.numel() == pytest.approx(1.4e-7, rel=0.05)


def test_one_tensor_holds_both_steps_at_6_bits(after_gelu: Tensor) -> None:
    """Below zero, half the step of one region and a third of its error, also where no value is clipped."""
    low, high = after_gelu.min(), after_gelu.max()
    step = (high - low) / 63
    zero = (-low / step).round().to(torch.uint8)
    plain = ops.dequantize(ops.quantize(after_gelu, step, zero, 0, 63, 0), step, zero, 0)
    scale = high / (UNSIGNED.high - UNSIGNED.zero)
    assert scale < 0.51 * step
    back = UNSIGNED.dequantize(UNSIGNED.quantize(after_gelu, scale), scale)
    assert error_below_zero(after_gelu, back) < 0.35 * error_below_zero(after_gelu, plain)
