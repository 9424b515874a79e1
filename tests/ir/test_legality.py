"""Every rule of the legality table refuses what it is there for, and says where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from qcgraph.errors import ContractError
from qcgraph.ir import legality
from qcgraph.ir.edit import GraphEditor, with_edits
from qcgraph.ir.legal_operators import LEGAL_OPERATORS
from qcgraph.ir.program import Program
from qcgraph.plan.roles import REUSES
from qcgraph.plan.spec import GROUP
from qcgraph.plan.steps import StepPlan

aten = torch.ops.aten
ops = torch.ops.qcgraph


def edited(program: Program, edit: Callable[[GraphEditor, fx.Node], None]) -> Program:
    """The program after an edit at its first quantizable linear."""
    editor = GraphEditor(program.variants["main"], program.constants, "test")
    node = next(
        node for node in editor.graph.nodes if node.target is aten.linear.default and node.meta["val"].dim() == 3
    )
    edit(editor, node)
    return with_edits(program, {"main": editor})


def quantized(
    scale: torch.Tensor, zero: torch.Tensor, low: int = 0, high: int = 255
) -> Callable[[GraphEditor, fx.Node], None]:
    def edit(editor: GraphEditor, linear: fx.Node) -> None:
        with editor.before(linear):
            parameters = [editor.constant("s", scale, linear), editor.constant("z", zero, linear)]
            q = editor.call(ops.quantize.default, linear.args[0], *parameters, low, high, 0, source=linear)
            back = editor.call(ops.dequantize.default, q, *parameters, 0, source=linear)
        linear.args = (back, *linear.args[1:])

    return edit


ONE, ZERO = torch.tensor(0.1), torch.tensor(0, dtype=torch.uint8)


def test_a_quantized_program_is_legal(captured: Program) -> None:
    legality.verify(edited(captured, quantized(ONE, ZERO)))


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (quantized(torch.tensor(0.0), ZERO), "scale s holds a value that is not positive and finite"),
        (quantized(torch.tensor(float("nan")), ZERO), "scale s holds a value that is not positive and finite"),
        (quantized(ONE, torch.tensor(0, dtype=torch.int32)), "zero point is torch.int32"),
        (quantized(torch.tensor([0.1, 0.1]), ZERO), "differ in shape"),
        (quantized(ONE, ZERO, -1, 255), "do not fit torch.uint8"),
    ],
)
def test_quantization_rules(captured: Program, edit: Callable[[GraphEditor, fx.Node], None], reason: str) -> None:
    with pytest.raises(ContractError, match=reason) as caught:
        legality.verify(edited(captured, edit))
    assert "blocks.0.attn.qkv" in str(caught.value.where)


def test_codes_do_not_escape(captured: Program) -> None:
    def escape(editor: GraphEditor, linear: fx.Node) -> None:
        quantized(ONE, ZERO)(editor, linear)
        q = next(node for node in editor.graph.nodes if node.target is ops.quantize.default)
        with editor.after(q):
            stray = editor.call(aten.to.dtype, q, torch.float32, source=q)
        linear.args = (stray, *linear.args[1:])

    with pytest.raises(ContractError, match="without a dequantize"):
        legality.verify(edited(captured, escape))


def test_writing_ops_are_illegal(captured: Program) -> None:
    def write(editor: GraphEditor, linear: fx.Node) -> None:
        with editor.before(linear):
            node = editor.call(aten.relu_.default, linear.args[0], source=linear)
        linear.args = (node, *linear.args[1:])

    with pytest.raises(ContractError, match="writes to its input"):
        legality.verify(edited(captured, write))


@pytest.mark.parametrize(
    ("target", "arguments"), [(aten.rand_like.default, ()), (aten.empty_like.default, ()), (aten.bernoulli.default, ())]
)
def test_only_admitted_operators_are_legal(captured: Program, target: Any, arguments: tuple[Any, ...]) -> None:
    def call(editor: GraphEditor, linear: fx.Node) -> None:
        with editor.before(linear):
            node = editor.call(target, linear.args[0], *arguments, source=linear)
        linear.args = (node, *linear.args[1:])

    with pytest.raises(ContractError, match="not among the operators that a program may call"):
        legality.verify(edited(captured, call))


def test_attention_without_dropout_alone_is_legal(captured: Program) -> None:
    def drop(editor: GraphEditor, linear: fx.Node) -> None:
        attention = next(n for n in editor.graph.nodes if n.target is aten.scaled_dot_product_attention.default)
        attention.args = (*attention.args[:3], None, 0.1)

    with pytest.raises(ContractError, match="draws random numbers"):
        legality.verify(edited(captured, drop))


def test_admitted_operators_exist_and_draw_nothing() -> None:
    """Each name is one of PyTorch's, and none of its overloads is random but attention, whose dropout is checked."""
    overloads = [
        getattr(getattr(aten, name), kind) for name in LEGAL_OPERATORS for kind in getattr(aten, name).overloads()
    ]
    drawing = {op for op in overloads if torch.Tag.nondeterministic_seeded in op.tags and not op._schema.is_mutable}
    assert drawing == {aten.scaled_dot_product_attention.default}


def test_a_table_must_cover_the_plan(captured: Program) -> None:
    def select(editor: GraphEditor, linear: fx.Node) -> None:
        bias = linear.args[2]
        assert isinstance(bias, fx.Node)
        table = torch.zeros(2, bias.meta["val"].shape[0])
        with editor.before(linear):
            index = editor.scalar_input(GROUP, linear)
            row = editor.call(ops.select.default, editor.constant("t", table, linear), index, source=linear)
        linear.args = (*linear.args[:2], row)

    program = edited(captured, select)
    legality.verify(program)
    plan = program.facts[StepPlan]
    wide = program.with_facts(plan.with_groups([min(index, 2) for index in range(len(plan))]))
    with pytest.raises(ContractError, match="table t has 2 rows, the plan needs 3"):
        legality.verify(wide)


def test_a_plan_must_name_variants_that_exist(captured: Program) -> None:
    plan = captured.facts[StepPlan]
    with pytest.raises(ContractError, match="variant 'reuse', which does not exist"):
        legality.verify(captured.with_facts(with_reuse(plan)))


def with_reuse(plan: StepPlan) -> StepPlan:
    """The plan with a variant that reuses at every step but the first."""
    return replace(plan, roles=plan.roles | {"reuse": REUSES}).with_modes([None] + ["reuse"] * (len(plan) - 1))


def test_every_variant_has_a_role(captured: Program, cached: Program) -> None:
    """Those that no step runs included; and no role is that of a variant that is not there."""
    plan = captured.facts[StepPlan]
    other = replace(captured, variants={**captured.variants, "other": captured.variants["main"]})
    with pytest.raises(ContractError, match="variant 'other' has no role"):
        legality.verify(other)
    unused = replace(plan, roles=plan.roles | {"reuse": REUSES})
    with pytest.raises(ContractError, match="variant 'reuse' has a role, and does not exist"):
        legality.verify(captured.with_facts(unused))
    legality.verify(other.with_facts(replace(plan, roles=plan.roles | {"other": REUSES})))


def test_a_modulation_is_prepared_where_it_is_taken(captured: Program, run: Callable[[str, Program], Program]) -> None:
    hoisted = run("hoist-adaln", captured)
    plan = hoisted.facts[StepPlan]
    legality.verify(hoisted)
    with pytest.raises(ContractError, match=r"a modulation is taken by \['main'\], and prepared for \[\]"):
        legality.verify(hoisted.with_facts(replace(plan, roles=plan.roles | {"prepare_main": REUSES})))
    untaken = replace(captured.facts[StepPlan], roles=plan.roles)
    prepared = replace(captured, variants={**captured.variants, "prepare_main": hoisted.variants["prepare_main"]})
    with pytest.raises(ContractError, match=r"a modulation is taken by \[\], and prepared for \['main'\]"):
        legality.verify(prepared.with_facts(untaken))


def test_cached_values_are_computed(cached: Program) -> None:
    """By the value that a tensor holds, whatever the tensor is called."""
    full, reuse = cached.variants["full"], cached.variants["reuse"]
    legality.verify(cached)
    (output,) = full.interface.caches
    outputs = tuple(replace(spec, value="another") if spec is output else spec for spec in full.interface.outputs)
    wrong = replace(full, interface=replace(full.interface, outputs=outputs))
    with pytest.raises(ContractError, match=r"variant 'reuse' takes 'cache_0', and no variant computes.*'cache_0'"):
        legality.verify(replace(cached, variants={"full": wrong, "reuse": reuse}))
    inputs = tuple(replace(spec, value="another") if spec.value else spec for spec in reuse.interface.inputs)
    asking = replace(reuse, interface=replace(reuse.interface, inputs=inputs))
    legality.verify(replace(cached, variants={"full": wrong, "reuse": asking}))


def test_a_missing_constant_is_found(captured: Program) -> None:
    constants = {name: value for name, value in captured.constants.items() if name != "pos_embed"}
    with pytest.raises(ContractError, match="refers to constant 'pos_embed'"):
        legality.verify(replace(captured, constants=constants))


def test_the_interface_must_tell_the_truth(captured: Program) -> None:
    variant = captured.variants["main"]
    wrong = replace(variant, interface=replace(variant.interface, inputs=variant.interface.inputs[:2]))
    with pytest.raises(ContractError, match="are not the inputs"):
        legality.verify(replace(captured, variants={"main": wrong}))


@pytest.mark.parametrize(
    ("shape", "others", "half", "reason"),
    [
        ((3, 2, 96), 1, torch.zeros(2, dtype=torch.int64), ""),
        ((2, 2, 96), 1, torch.zeros(2, dtype=torch.int64), "for 2 values of 96 channels"),
        ((3, 1, 96), 1, torch.zeros(2, dtype=torch.int64), "for 2 values of 96 channels"),
        ((3, 2, 95), 1, torch.zeros(2, dtype=torch.int64), "for 2 values of 96 channels"),
        ((3, 2, 96), 0, torch.zeros(2, dtype=torch.int64), "values of different types"),
        ((3, 2, 96), 1, torch.zeros(2, dtype=torch.int32), "half is not an int64 vector"),
        ((3, 2, 96), 1, torch.tensor(0), "half is not an int64 vector"),
    ],
)
def test_forecast_rules(
    captured: Program, shape: tuple[int, ...], others: int, half: torch.Tensor, reason: str
) -> None:
    """Two values, the second either of the same type or the input of the linear."""

    def forecast(editor: GraphEditor, linear: fx.Node) -> None:
        second = linear if others else linear.args[0]
        with editor.after(linear):
            coefficients = editor.constant("coefficients", torch.zeros(shape), linear)
            halves = editor.constant("halves", half, linear)
        with editor.before(next(iter(linear.users))):
            node = editor.graph.create_node(
                "call_function", ops.forecast.default, ([linear, second], coefficients, halves), name="forecast"
            )
            node.meta["val"] = linear.meta["val"]
        for user in [user for user in linear.users if user is not node]:
            user.replace_input_with(linear, node)

    program = edited(captured, forecast)
    if not reason:
        legality.verify(program)
        return
    with pytest.raises(ContractError, match=reason):
        legality.verify(program)
