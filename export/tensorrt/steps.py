r"""The steps that a network was fused to, read out of the bytes of an engine: a probe, and never an API.

Without the GPU that an engine is for, TensorRT does not say whether a product stayed in 8 bits. But an engine of
TensorRT-RTX holds its program as text, among other data::

    header {                          inputs, outputs, regions of memory
    descriptors {                     tensor={ ... name="q.1" ... type=int8 }
    main {                            steps on the GPU, one a line
      function={ name=__myl_MulAdd ... layers="[ONNX Layer: mul]\x1f[ONNX Layer: add]" }
      fully_connected={ name="linear" ... input={"q.1" "weight" ...} ... }
      runtime_fusion={ name=__myl_FcAdd ... binary=1 ... }
    shape_main {                      arithmetic of shapes on the host

After it follows a program of the same form for every ``runtime_fusion``, in the order of their ``binary``; its header
names ``runtime-fusion-consts``. This was found by inspection (TensorRT-RTX 1.7.1), is documented nowhere, and may
change with every version. Use it for counts in a report and in tests that are pinned to a version, and never for
decisions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

PROBED_VERSIONS = ("1.7",)  # versions of TensorRT-RTX whose probe results were compared with known engines

_PROGRAM = b"header {\n  version = "
_SECTION = re.compile(r"^(\w+) \{\n(.*?)^\}$", re.MULTILINE | re.DOTALL)
_STEP = re.compile(r"^ +(\w+)=\{ (.*)$", re.MULTILINE)
_NAME = re.compile(r'\bname=(?:"([^"]*)"|(\S+))')
_TENSOR = re.compile(r'^ +(?:sub_)?tensor=\{.* name="([^"]*)".* type=(\w+) \}$', re.MULTILINE)
_OPERANDS = re.compile(r"\binput=\{([^}]*)\}")
_BINARY = re.compile(r"\bbinary=(\d+)")
_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_FUSION = "runtime-fusion"
_CONTROL = ("cjmp", "jmp", "shape_call")  # jumps, and calls of the host
_PRODUCT = "fully_connected"
_ATTENTION = "_gemm_mha"
_JUMP = "cjmp"
_QUANTIZED = ("int8", "fp8_e4m3")  # element types


@dataclass(frozen=True)
class FusedStep:
    """One step of an engine.

    Attributes:
        kind: ``function`` (a generated kernel), ``fully_connected`` (a product of matrices), ``runtime_fusion`` (a
            product with the nodes before and after it), ``corrltn`` (a convolution) or another kind.
        name: TensorRT's name of the step.
        layers: the ONNX nodes that the step computes wholly or in part.
        quantized_gemms: number of products of two 8-bit matrices in the step.
    """

    kind: str
    name: str
    layers: tuple[str, ...]
    quantized_gemms: int = 0


@dataclass(frozen=True)
class FusedSteps:
    """The steps of an engine, in order.

    Attributes:
        steps: the steps on the GPU.
        conditional_jumps: number of jumps that depend on a value.
    """

    steps: tuple[FusedStep, ...]
    conditional_jumps: int

    @property
    def quantized_gemms(self) -> int:
        """The number of products of two 8-bit matrices; products that share an activation may have been merged."""
        return sum(step.quantized_gemms for step in self.steps)

    @property
    def fused_attention(self) -> int:
        """The number of attentions that one kernel computes."""
        return sum(step.name.startswith(_ATTENTION) for step in self.steps)

    @property
    def quantized_layers(self) -> frozenset[str]:
        """The ONNX nodes that became part of a product of two 8-bit matrices."""
        return frozenset(layer for step in self.steps if step.quantized_gemms for layer in step.layers)

    @property
    def attention_layers(self) -> frozenset[str]:
        """The ONNX nodes that became part of an attention that one kernel computes."""
        return frozenset(layer for step in self.steps if step.name.startswith(_ATTENTION) for layer in step.layers)


@dataclass(frozen=True)
class _FusedProgram:
    """A program in an engine: its sections by name."""

    sections: Mapping[str, str]

    @property
    def is_fusion(self) -> bool:
        return _FUSION in self.sections.get("header", "")

    @property
    def main(self) -> str:
        return self.sections.get("main", "")

    @property
    def lines(self) -> Iterator[tuple[str, str]]:
        """Kind and text of every step."""
        return ((match[1], match[2]) for match in _STEP.finditer(self.main))

    @cached_property
    def types(self) -> Mapping[str, str]:
        """The element type of every tensor."""
        return {match[1]: match[2] for match in _TENSOR.finditer(self.sections.get("descriptors", ""))}

    def is_quantized_product(self, kind: str, text: str) -> bool:
        operands = _OPERANDS.search(text) if kind == _PRODUCT else None
        names = re.findall(r'"([^"]*)"', operands[1])[:2] if operands else []
        return len(names) == 2 and all(self.types.get(name) in _QUANTIZED for name in names)

    @property
    def quantized_products(self) -> int:
        return sum(self.is_quantized_product(kind, text) for kind, text in self.lines)


def fused_steps(engine: bytes | memoryview) -> FusedSteps | None:
    """Return the steps of an engine of TensorRT-RTX, as far as its bytes show them.

    Args:
        engine: the serialized engine.

    Returns:
        The steps, or None where no program was found: other versions may write engines in other ways.
    """
    programs = list(_programs(bytes(engine)))
    steps: list[FusedStep] = []
    for index, program in enumerate(programs):
        if not program.is_fusion:
            steps += _steps(program, programs[index + 1 :])
    jumps = sum(len(re.findall(rf"\b{_JUMP}\b", program.main)) for program in programs)
    return FusedSteps(tuple(steps), jumps) if steps else None


def _programs(engine: bytes) -> Iterator[_FusedProgram]:
    start = engine.find(_PROGRAM)
    while start >= 0:
        end = engine.find(b"\0", start)
        text = engine[start : end if end >= 0 else None].decode("utf-8", "replace")
        yield _FusedProgram({match[1]: match[2] for match in _SECTION.finditer(text)})
        start = engine.find(_PROGRAM, start + len(_PROGRAM))


def _steps(program: _FusedProgram, following: Sequence[_FusedProgram]) -> Iterator[FusedStep]:
    for kind, text in program.lines:
        if kind in _CONTROL:
            continue
        name = _NAME.search(text)
        products = int(program.is_quantized_product(kind, text))
        binary = _BINARY.search(text)
        if kind == "runtime_fusion" and binary and int(binary[1]) < len(following):
            products = following[int(binary[1])].quantized_products
        layers = tuple(dict.fromkeys(_LAYER.findall(text)))
        yield FusedStep(kind, (name[1] or name[2]) if name else "", layers, products)
