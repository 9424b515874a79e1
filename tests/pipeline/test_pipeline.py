"""Pass, registry and pipeline: the text round trip, contracts, truthful change, errors that say where."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from qcgraph.errors import ContractError, QcgraphError, UsageError
from qcgraph.facts import CachePlan, Compensation, QuantPlan
from qcgraph.ir.graph import Variant
from qcgraph.ir.program import Program
from qcgraph.ir.serialize import load_program
from qcgraph.pipeline import Instrument, Pass, PassContext, Pipeline, make_pass, registry
from qcgraph.pipeline.instruments import Dump, PrintAfter, Reproduce, Timer, VerifyEach
from qcgraph.pipeline.pipeline import _providers
from qcgraph.progress import Progress


@pytest.mark.parametrize(
    "text",
    [
        "plan-cache",
        "plan-cache{interval=5}",
        "plan-cache{interval=5 blocks=0..1},insert-cache,calibrate{trajectories=4 seed=3}",
        "plan-quant{weight-bits=4 symmetric=true},fit-compensation{clamp=0.05}",
        "",
    ],
)
def test_text_round_trip(text: str) -> None:
    assert Pipeline.parse(text).text == text


def test_defaults_are_not_spelled_out() -> None:
    assert Pipeline.parse("plan-cache{interval=3 blocks=all}").text == "plan-cache"
    assert Pipeline.parse(" plan-cache , insert-cache ").text == "plan-cache,insert-cache"


@pytest.mark.parametrize("name", sorted(registry()))
def test_every_pass_documents_itself(name: str) -> None:
    kind = registry()[name]
    assert kind.summary().endswith((".", ")"))
    assert len(kind.summary()) < 160
    assert make_pass(name, {}).text == name
    documented = kind.__doc__ or ""
    assert all(f"{field}:" in documented for field in [item.name for item in fields(kind)])


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("plan-cash", "unknown pass 'plan-cash'", "did you mean 'plan-cache'"),
        ("plan-cache{intervall=2}", "no option 'intervall'", "did you mean 'interval'"),
        ("plan-cache{interval=two}", "option interval", "qcgraph passes plan-cache"),
        ("insert-cache{x=1}", "no option 'x'", "it has none"),
        ("plan-cache{interval 2}", "cannot read options", "key=value"),
        ("plan-cache{interval=2", "cannot read", "name{key=value"),
        ("plan-cache,", "ends with a comma", "last comma"),
        ("plan-cache{interval=2 interval=3}", "says 'interval' twice", "once"),
        ("plan-cache{interval=2.0}", "interval 2.0 is not a", "qcgraph passes plan-cache"),
        ("plan-cache{interval=true}", "interval True is not a", "qcgraph passes plan-cache"),
        ("plan-cache{budget=NaN}", "budget nan is not a", "qcgraph passes plan-cache"),
        ("plan-cache{budget=1e999}", "budget inf is not a", "qcgraph passes plan-cache"),
        ("plan-cache{interval=" + "1" * 4301 + "}", "option interval", "qcgraph passes plan-cache"),
        ("plan-cache{interval=" + "1" * 4300 + "}", "option interval", "qcgraph passes plan-cache"),
        ("plan-cache{interval=" + "[" * 5000 + "}", "option interval", "qcgraph passes plan-cache"),
        ("plan-cache{blocks=" + '"' + r"\ud800" + '"}', "option blocks", "qcgraph passes plan-cache"),
        ("plan-cache{blocks=\udcff}", "is no text", "UTF-8"),
        ("plan-cache," * 20_000, "a text of 220000 characters", "200000"),
    ],
)
def test_malformed_text(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Pipeline.parse(text)
    assert hint in str(caught.value.hint)


def test_a_missing_fact_names_the_pass_that_provides_it(captured: Program) -> None:
    with pytest.raises(ContractError, match="needs QuantPlan") as caught:
        Pipeline.parse("plan-cache,insert-cache,insert-qdq").run(captured)
    assert caught.value.hint == "run plan-quant before it"
    assert caught.value.where == "pass insert-qdq (after plan-cache, insert-cache)"


def test_a_missing_fact_names_the_option_that_provides_it() -> None:
    for kind in registry().values():
        for text, fact in kind.provides_with:
            assert Pipeline.parse(text).passes[0].name == kind.name
            assert fact not in kind.provides
    assert _providers(["CalibrationSet"]) == ["calibrate{selection=tap}"]


def test_search_scales_without_a_calibration_set(captured: Program) -> None:
    with pytest.raises(ContractError, match="needs CalibrationSet") as caught:
        Pipeline.parse("calibrate{trajectories=1},plan-quant,search-scales").run(captured)
    assert caught.value.hint == "run calibrate{selection=tap} before it"


@dataclass(frozen=True)
class Identity(Pass):
    """Do nothing."""

    name: ClassVar[str] = "identity"

    def run(self, program: Program, context: PassContext) -> Program:
        context.refuse("everything", "on principle")
        return replace(program)


@dataclass(frozen=True)
class Breaks(Pass):
    """Break the program in one way or another."""

    name: ClassVar[str] = "breaks"
    provides: ClassVar[tuple[type, ...]] = ()
    how: str = "raise"

    def run(self, program: Program, context: PassContext) -> Program:
        main = program.variants["main"]
        if self.how == "raise":
            raise RuntimeError("out of luck")
        if self.how == "illegal":
            return replace(program, variants={"main": Variant(main.graph, replace(main.interface, inputs=()))})
        program.constants["blocks.0.attn.qkv.bias"].add_(1)
        return program


@dataclass(frozen=True)
class Promises(Pass):
    """Promise a fact and do not provide it."""

    name: ClassVar[str] = "promises"
    provides: ClassVar[tuple[type, ...]] = (QuantPlan,)

    def run(self, program: Program, context: PassContext) -> Program:
        return program


def test_changed_is_computed_and_refusals_are_kept(captured: Program) -> None:
    record = Pipeline((Identity(),)).run(captured).history[-1]
    assert not record.changed
    assert record.refusals[0].reason == "on principle"
    assert Pipeline.parse("plan-cache").run(captured).history[-1].changed


def test_a_broken_promise_is_the_passes_fault(captured: Program) -> None:
    with pytest.raises(ContractError, match="promised QuantPlan and did not provide it") as caught:
        Pipeline((Promises(),)).run(captured)
    assert caught.value.hint == "return program.with_facts(QuantPlan(...))"


def test_a_fault_of_a_pass_is_located(captured: Program) -> None:
    with pytest.raises(ContractError, match="RuntimeError: out of luck") as caught:
        Pipeline((Breaks(),)).run(captured)
    line = next(number for number, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "out of" in text)
    assert str(caught.value.where).endswith(f", {__file__}:{line}, in run")


def test_an_illegal_result_is_refused(captured: Program) -> None:
    with pytest.raises(ContractError, match="illegal program: placeholders"):
        Pipeline((Breaks("illegal"),)).run(captured)


def test_failure_leaves_a_reproducer_that_fails_alike(captured: Program, tmp_path: Path) -> None:
    pipeline = Pipeline((make_pass("plan-cache", {}), Breaks(), make_pass("insert-cache", {})))
    folder = tmp_path / "reproducer"
    with pytest.raises(QcgraphError, match="RuntimeError: out of luck") as caught:
        pipeline.run(captured, [Reproduce(lambda: folder, Progress())])
    assert "after plan-cache" in str(caught.value.where)
    assert (folder / "pipeline.txt").read_text() == "breaks,insert-cache\n"
    assert "out of luck" in (folder / "error.txt").read_text()
    saved = load_program(folder)
    assert CachePlan in saved.facts
    with pytest.raises(QcgraphError, match="out of luck"):
        Pipeline(pipeline.passes[1:]).run(saved)


def test_a_reproducer_replaces_an_earlier_one_alone(captured: Program, tmp_path: Path) -> None:
    notes = Notes()

    def fail() -> None:
        with pytest.raises(QcgraphError, match="out of luck"):
            Pipeline((Breaks(),)).run(captured, [Reproduce(lambda: tmp_path / "out.reproducer", notes)])

    fail()
    fail()
    assert [path.name for path in tmp_path.iterdir()] == ["out.reproducer"]
    (tmp_path / "out.reproducer" / "notes.txt").write_text("mine")
    fail()
    assert (tmp_path / "out.reproducer" / "notes.txt").read_text() == "mine"
    assert "saved no reproducer" in notes.lines[-1]
    assert "holds notes.txt, which qcgraph did not write" in notes.lines[-1]
    shutil.rmtree(tmp_path / "out.reproducer")
    (tmp_path / "out.reproducer").mkdir()
    (tmp_path / "out.reproducer" / "mine.txt").touch()
    fail()
    assert [path.name for path in (tmp_path / "out.reproducer").iterdir()] == ["mine.txt"]


def test_wrong_input_leaves_no_reproducer(captured: Program, tmp_path: Path) -> None:
    folder = tmp_path / "reproducer"
    with pytest.raises(UsageError):
        Pipeline.parse("plan-cache{interval=0}").run(captured, [Reproduce(lambda: folder, Progress())])
    assert not folder.exists()


def test_verify_each_catches_a_pass_that_writes_to_its_input(captured: Program) -> None:
    own = replace(captured, constants={name: value.clone() for name, value in captured.constants.items()})
    with pytest.raises(ContractError, match="wrote to the program it was given"):
        Pipeline((Breaks("write"),)).run(own, [VerifyEach(own, Progress())])


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.slow
def test_verify_each_reports_the_numbers_of_every_variant(captured: Program) -> None:
    notes = Notes()
    Pipeline.parse("plan-cache,insert-cache").run(captured, [VerifyEach(captured, notes)])
    assert any("full: noise prediction 0.00e+00" in line for line in notes.lines)
    assert any("reuse: noise prediction" in line for line in notes.lines)


def test_dump_and_diff(captured: Program, tmp_path: Path) -> None:
    dump, timer = Dump(captured), Timer(Progress())
    Pipeline.parse("plan-cache,insert-cache").run(captured, [dump, timer])
    dump.write(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    texts = ["000_capture.txt", "001_plan-cache.diff", "001_plan-cache.txt"]
    assert names == [*texts, "002_insert-cache.diff", "002_insert-cache.txt"]
    assert "+graph reuse(" in (tmp_path / "002_insert-cache.diff").read_text()
    assert len(timer.seconds) == 2


@pytest.mark.parametrize(("names", "expected"), [(("insert-cache",), 1), (("all",), 2), ((), 0)])
def test_print_after(captured: Program, names: tuple[str, ...], expected: int, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w+") as out:
        Pipeline((make_pass("plan-cache", {}), Identity(), make_pass("insert-cache", {}))).run(
            captured, [PrintAfter(names, out)]
        )
        out.seek(0)
        assert out.read().count("; after ") == expected


def test_instruments_see_every_pass_in_order(captured: Program) -> None:
    class Order(Instrument):
        def __init__(self) -> None:
            self.events: list[str] = []

        def before(self, pass_: Pass, program: Program) -> None:
            self.events.append(f"before {pass_.name}")

        def after(self, pass_: Pass, before: Program, after: Program) -> None:
            self.events.append(f"after {after.history[-1].text}")

    order = Order()
    Pipeline.parse("plan-cache{interval=2},insert-cache").run(captured, [order])
    assert order.events == [
        "before plan-cache",
        "after plan-cache{interval=2}",
        "before insert-cache",
        "after insert-cache",
    ]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_facts_are_keyed_by_type(captured: Program) -> None:
    with pytest.raises(QcgraphError, match="holds no Compensation"):
        captured.facts[Compensation]
