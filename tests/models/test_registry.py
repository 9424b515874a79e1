"""Every name that load_model takes, and what it says to those that it does not take."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qcgraph.errors import UsageError
from qcgraph.models import LoadedModel, checkout, list_models, load_model
from qcgraph.models.factory import try_forward
from qcgraph.models.geometry import GEOMETRIES
from qcgraph.models.registry import check_loaded
from qcgraph.plan.spec import ModelSpec, NoiseSchedule

FACTORY_MODULE = """
import sys
from dataclasses import replace
import numpy as np
import torch
from torch import nn
from qcgraph.models import Judge, LoadedModel, load_model
from qcgraph.plan.spec import Condition, ModelSpec, NoiseSchedule, class_label

def brightness(images):
    return images.mean(axis=(2, 3))
def is_bright(images):
    return (brightness(images)[:, 0] > 0).astype(np.int64)
JUDGE = Judge(brightness, is_bright, feature_count=1, real=np.zeros((3, 1, 4, 4), np.float32))

class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(__import__("torch").ones(1).double())
    def forward(self, latent, when, label):
        return latent * self.scale

SPEC = ModelSpec.class_conditional(name="mine", latent_shape=(1, 4, 4), class_count=2, null_class=2, output_channels=1)

def good():
    return LoadedModel(Denoiser(), SPEC, ("latent", "when", "label"))
def compiled():
    return LoadedModel(__import__("torch").compile(Denoiser()), SPEC, ("latent", "when", "label"))
def parallel():
    return LoadedModel(nn.DataParallel(Denoiser()), SPEC, ("latent", "when", "label"))
def judged():
    return LoadedModel(Denoiser(), SPEC, ("latent", "when", "label"), judge=lambda: JUDGE)
def unsupported():
    spec = replace(SPEC, noise_schedule=NoiseSchedule(beta_schedule="sigmoid"))
    return LoadedModel(Denoiser(), spec, ("latent", "when", "label"))
def misnamed():
    return LoadedModel(Denoiser(), SPEC, ("latent", "timestep", "label"))
def bare():
    return Denoiser()
def diverged():
    model = good()
    model.module.scale.data.fill_(float("nan"))
    return model
not_a_function = 3

def with_spec(**changes):
    return LoadedModel(Denoiser(), replace(SPEC, **changes), ("latent", "when", "label"))
def with_module(change):
    module = Denoiser()
    change(module)
    return LoadedModel(module, SPEC, ("latent", "when", "label"))
def raises():
    return 1 / 0
def leaves():
    sys.exit(3)
def recurses():
    return recurses()
def uses_qcgraph():
    return load_model("no-such-model")
def asks(argument):
    return argument
def negative():
    return with_spec(conditions=(class_label(-1),))
def negative_null():
    return with_spec(conditions=(class_label(2, null=-1),))
def broken_null():
    return with_spec(conditions=(class_label(2, null=1.5),))
def taken_name():
    return with_spec(conditions=(class_label(2, name="timestep"),))
def twice():
    return with_spec(conditions=(class_label(2), class_label(3)))
def uncounted():
    return with_spec(conditions=(Condition("label", "i64"),))
def flat():
    return with_spec(latent_shape=(1, 0, 4))
def two():
    return with_spec(latent_shape=(4, 4))
def nameless():
    return with_spec(name="")
def without_betas():
    return with_spec(noise_schedule=NoiseSchedule(beta_start=None))
def without_schedule():
    return with_spec(noise_schedule=None)
def without_spec():
    return LoadedModel(Denoiser(), None, ("latent", "when", "label"))
def without_module():
    return LoadedModel(None, SPEC, ("latent", "when", "label"))
def two_names():
    return LoadedModel(Denoiser(), SPEC, ("latent", "when"))
def wide():
    return with_spec(latent_shape=(2, 4, 4), output_channels=1)
def other_output():
    return with_spec(output_channels=2)
def eight_bits():
    return with_module(lambda module: setattr(module, "scale", nn.Parameter(torch.ones(1).to(torch.int8), False)))
def sparse():
    return with_module(lambda module: setattr(module, "scale", nn.Parameter(torch.ones(1).to_sparse())))
def complex_buffer():
    return with_module(lambda module: module.register_buffer("rope", torch.ones(1, dtype=torch.complex64)))
def valueless():
    return with_module(lambda module: module.to("meta"))
def packed():
    class Packed(Denoiser):
        def __init__(self):
            super().__init__()
            self.linear = torch.ao.nn.quantized.dynamic.Linear(4, 4)
    return LoadedModel(Packed(), SPEC, ("latent", "when", "label"))
def indexed():
    return with_module(lambda module: module.register_buffer("positions", torch.arange(4)))
def reshapes():
    class Reshapes(Denoiser):
        def forward(self, latent, when, label):
            return latent.reshape(7)
    return LoadedModel(Reshapes(), SPEC, ("latent", "when", "label"))
def compiled():
    return LoadedModel(torch.compile(Denoiser()), SPEC, ("latent", "when", "label"))
def parallel():
    return LoadedModel(nn.DataParallel(torch.compile(Denoiser())), SPEC, ("latent", "when", "label"))
def rows():
    class Rows(Denoiser):
        def __init__(self):
            super().__init__()
            self.rows = nn.Embedding(2, 1)
        def forward(self, latent, when, label):
            return latent + self.rows(label)[:, :, None, None]
    return LoadedModel(Rows(), SPEC, ("latent", "when", "label"))
"""


@pytest.fixture
def factory_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "factory_of_test.py").write_text(FACTORY_MODULE)
    (tmp_path / "broken_of_test.py").write_text("import a_module_that_is_not_there")
    (tmp_path / "syntax_of_test.py").write_text("def (")
    (tmp_path / "raising_of_test.py").write_text("\n\nraise RuntimeError('no GPU')")
    (tmp_path / "leaving_of_test.py").write_text("raise SystemExit(1)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "factory_of_test", raising=False)
    return "factory_of_test"


def refusal_of(name: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load_model(name)
    assert caught.value.hint
    return caught.value


def assert_ready(model: LoadedModel) -> None:
    assert not model.module.training
    assert all(not parameter.requires_grad for parameter in model.module.parameters())
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}
    latent = torch.zeros(2, *model.spec.latent_shape)
    label = torch.tensor([0, model.spec.conditions[0].null])
    inputs = dict(zip(model.input_names, (latent, torch.tensor([3, 700]), label), strict=True))
    output = model.module(**inputs)
    assert output.shape == (2, model.spec.output_channels, *model.spec.latent_shape[1:])


def test_listing_imports_no_torch() -> None:
    code = "import sys, qcgraph.models as m; m.list_models(); print(sorted({'torch', 'sklearn'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_loading_does_not_import_the_compiler_of_pytorch() -> None:
    """It takes seconds, which every process that runs a model would wait for."""
    code = (
        "import sys; from qcgraph.models import load_model; load_model('digits'); print('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"


def test_listing_names_every_geometry() -> None:
    models = {model.name.split(":")[0]: model for model in list_models()}
    forms = {"DIFFUSERS_FOLDER", "TRAINED_FOLDER", "PACKAGE.MODULE"}
    assert set(models) == {"digits", *checkout.NAMES, *GEOMETRIES, *forms}
    assert models["dit-xl-2"].parameters == 675_129_632
    assert all(len(model.description) < 80 for model in models.values())


def test_digits() -> None:
    model = load_model("digits")
    assert_ready(model)
    assert model.spec == ModelSpec.class_conditional(
        name="digits",
        latent_shape=(1, 8, 8),
        class_count=10,
        null_class=10,
        output_channels=1,
        noise_schedule=NoiseSchedule(),
        is_image=True,
    )
    assert model.input_names == ("x", "t", "y")


def test_random_geometry() -> None:
    model = load_model("dit-s-8:random", seed=5)
    assert_ready(model)
    assert model.spec == ModelSpec.class_conditional(
        name="dit-s-8", latent_shape=(4, 32, 32), class_count=1000, null_class=1000, output_channels=8
    )
    same, other = load_model("dit-s-8:random", seed=5), load_model("dit-s-8:random", seed=6)
    weight = "blocks.3.mlp.fc1.weight"
    assert torch.equal(model.module.state_dict()[weight], same.module.state_dict()[weight])
    assert not torch.equal(model.module.state_dict()[weight], other.module.state_dict()[weight])


def test_random_geometry_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_model("dit-s-8:random")
    assert torch.equal(torch.rand(3), expected)


def test_checkpoint(tmp_path: Path) -> None:
    weights = load_model("dit-s-8:random", seed=2).module.state_dict()
    torch.save({"ema": weights}, tmp_path / "dit.pt")
    loaded = load_model(f"dit-s-8:{tmp_path / 'dit.pt'}")
    assert_ready(loaded)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.module.state_dict().items())


def test_checkpoint_of_another_geometry(tmp_path: Path) -> None:
    save_file(load_model("dit-s-8:random").module.state_dict(), tmp_path / "dit.safetensors")
    assert "the shapes are not those" in refusal_of(f"dit-s-4:{tmp_path / 'dit.safetensors'}").message
    assert "missing blocks.12." in refusal_of(f"dit-l-8:{tmp_path / 'dit.safetensors'}").message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_checkpoint_that_diverged(value: float, tmp_path: Path) -> None:
    weights = load_model("dit-s-8:random").module.state_dict()
    weights["blocks.4.attn.proj.weight"][3, 5] = value
    torch.save(weights, tmp_path / "dit.pt")
    refusal = refusal_of(f"dit-s-8:{tmp_path / 'dit.pt'}")
    assert "blocks.4.attn.proj.weight" in refusal.message


def test_geometry_without_weights() -> None:
    for name in ("dit-s-2", "dit-s-2:"):
        assert "dit-s-2:random" in str(refusal_of(name).hint)


def test_unknown_geometry() -> None:
    refusal = refusal_of("dit-xxl-2:random")
    assert "unknown geometry 'dit-xxl-2'" in refusal.message
    assert "did you mean 'dit-xl-2'?" in str(refusal.hint)


@pytest.mark.parametrize("name", ["digit", "dit-xl", "", "no/such/folder", "a" * 5000, "a\0b"])
def test_unknown_name(name: str) -> None:
    refusal = refusal_of(name)
    assert "unknown model" in refusal.message
    assert "digits" in str(refusal.hint)


def test_checkpoint_without_geometry(tmp_path: Path) -> None:
    path = tmp_path / "dit.pt"
    path.touch()
    assert f"dit-xl-2:{path}" in str(refusal_of(str(path)).hint)


def test_missing_checkpoint() -> None:
    assert "no such checkpoint file" in refusal_of("dit-s-2:nowhere.pt").message


def test_factory(factory_module: str) -> None:
    model = load_model(f"{factory_module}:good")
    assert_ready(model)
    assert model.spec.name == "mine"
    assert model.judge is None


@pytest.mark.parametrize("factory", ["compiled", "parallel"])
def test_wrappers_of_a_factorys_module_are_taken_off(factory_module: str, factory: str) -> None:
    assert type(load_model(f"{factory_module}:{factory}").module).__name__ == "Denoiser"


def test_factory_may_supply_a_judge(factory_module: str) -> None:
    model = load_model(f"{factory_module}:judged")
    assert model.judge is not None
    assert model.judge().classify(np.full((2, 1, 4, 4), 0.5, np.float32)).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("factory", "complaint"),
    [
        ("factory_of_test:bare", "returned Denoiser"),
        ("factory_of_test:absent", "has no function 'absent'"),
        ("factory_of_test:not_a_function", "has no function 'not_a_function'"),
        ("factory_of_test:misnamed", "no parameter 'timestep'; it has latent, when, label"),
        ("factory_of_test:diverged", "parameter scale is not finite"),
        ("factory_of_test:unsupported", "beta_schedule 'sigmoid' is not supported"),
        ("factory_of_test:raises", "your factory raises() raised ZeroDivisionError: division by zero ("),
        ("factory_of_test:leaves", "your factory leaves() raised SystemExit: 3 ("),
        ("factory_of_test:recurses", "your factory recurses() raised RecursionError"),
        ("factory_of_test:asks", "raised TypeError: asks() missing 1 required positional argument"),
        ("factory_of_test:uses_qcgraph", "unknown model"),
        ("raising_of_test:factory", "importing raising_of_test raised RuntimeError: no GPU ("),
        ("leaving_of_test:factory", "importing leaving_of_test raised SystemExit: 1 ("),
        ("factory_of_test:uncounted", "the condition label is of integers, and has no count"),
        ("factory_of_test:negative", "conditions.0.count = -1 of its spec does not fit"),
        ("factory_of_test:negative_null", "the null value -1 of the condition 'class_label' is no index"),
        ("factory_of_test:broken_null", "the null value 1.5 of the condition 'class_label' is no index"),
        ("factory_of_test:taken_name", "the condition 'timestep' has a name that is taken"),
        ("factory_of_test:twice", "the condition 'class_label' has a name that is taken"),
        ("factory_of_test:flat", "latent_shape.1 = 0 of its spec does not fit"),
        ("factory_of_test:two", "latent_shape.2 = (4, 4) of its spec does not fit"),
        ("factory_of_test:nameless", "name = '' of its spec does not fit"),
        ("factory_of_test:without_betas", "noise_schedule.beta_start = None of its spec does not fit"),
        ("factory_of_test:without_schedule", "the spec is a ModelSpec with the noise schedule None"),
        ("factory_of_test:without_spec", "the spec is a NoneType"),
        ("factory_of_test:without_module", "the module is a NoneType"),
        ("factory_of_test:two_names", "input_names are ('latent', 'when'), not 3 names"),
        ("factory_of_test:wide", "output_channels 1 are fewer than the 2 of the latent"),
        ("factory_of_test:other_output", "the module returns (2, 1, 4, 4), and its spec says (2, 2, 4, 4)"),
        ("factory_of_test:eight_bits", "parameter scale is int8, and not floating point"),
        ("factory_of_test:sparse", "parameter scale is sparse"),
        ("factory_of_test:complex_buffer", "parameter rope is complex64"),
        ("factory_of_test:valueless", "parameter scale is without values"),
        ("factory_of_test:packed", "its layers are packed, as quantized ones are"),
        ("factory_of_test:reshapes", "the module fails on latents [2, 1, 4, 4], the shape in its spec: RuntimeError"),
        ("broken_of_test:factory", "No module named 'a_module_that_is_not_there'"),
        ("syntax_of_test:factory", "invalid syntax"),
        ("package_that_is_not_there.module:factory", "No module named 'package_that_is_not_there'"),
    ],
)
def test_factory_that_does_not_fit(factory: str, complaint: str, factory_module: str) -> None:
    assert complaint in refusal_of(factory).message


def test_a_factory_that_raises_is_told_where(factory_module: str) -> None:
    line = 1 + FACTORY_MODULE.splitlines().index("    return 1 / 0")
    refusal = refusal_of(f"{factory_module}:raises")
    assert f"factory_of_test.py:{line})" in refusal.message
    assert "your code, not by qcgraph" in str(refusal.hint)
    assert "raising_of_test.py:3)" in refusal_of("raising_of_test:factory").message


def test_wrappers_and_precision_of_a_factorys_module_are_noted(factory_module: str) -> None:
    for name in ("compiled", "parallel"):  # the second is compiled inside of what spreads it over devices
        model = load_model(f"{factory_module}:{name}")
        assert type(model.module).__name__ == "Denoiser"
        assert sum("taken out of its wrapper" in note for note in model.notes) == 1
    assert load_model(f"{factory_module}:good").notes == ("the weights are converted from float64 to float32",)
    assert_ready(load_model(f"{factory_module}:indexed"))


def test_a_row_for_the_null_class_is_needed_under_guidance_alone(factory_module: str) -> None:
    model = load_model(f"{factory_module}:rows")
    try_forward(model, "rows")
    with pytest.raises(UsageError, match="no row for the null value class_label 2, which guidance needs") as refusal:
        try_forward(model, "rows", is_guided=True)
    assert "--guidance 1" in str(refusal.value.hint)


def test_a_model_made_in_python_is_checked(tiny_model: LoadedModel) -> None:
    assert check_loaded(tiny_model) is tiny_model
    wrapped = replace(tiny_model, module=torch.compile(tiny_model.module))
    assert check_loaded(wrapped).module is tiny_model.module
    for module, complaint in (
        (copy.deepcopy(tiny_model.module).half(), "the model computes in float16"),
        (copy.deepcopy(tiny_model.module).train(), "the model is in training mode"),
        (tiny_model, "the module is a LoadedModel"),
    ):
        with pytest.raises(UsageError, match=complaint):
            check_loaded(replace(tiny_model, module=module))  # type: ignore[arg-type]


def test_factory_without_a_model_says_what_to_return(factory_module: str) -> None:
    assert "returns a qcgraph.models.LoadedModel" in str(refusal_of(f"{factory_module}:bare").hint)


def test_loaded_model_is_frozen() -> None:
    class Identity(nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return x

    spec = ModelSpec.class_conditional(
        name="identity", latent_shape=(1, 2, 2), class_count=1, null_class=1, output_channels=1
    )
    model = LoadedModel(Identity(), spec, ("x", "t", "y"))
    with pytest.raises(AttributeError):
        model.spec = replace(spec, name="other")  # type: ignore[misc]


def test_folder_without_a_model(tmp_path: Path) -> None:
    refusal = refusal_of(str(tmp_path))
    assert "neither one that diffusers saved nor one that a training tool wrote" in refusal.message
    assert "config.json" in str(refusal.hint)
    assert "card.json" in str(refusal.hint)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"_class_name": "SD3Transformer2DModel"}, "SD3Transformer2DModel is not supported"),
        ({"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single"}, "Transformer2DModel is not supported"),
        ({"model_type": "bert"}, "names no _class_name"),
        ([1], "expected a JSON object"),
        ({"_class_name": "DiTTransformer2DModel"}, "the folder has no weights"),
    ],
)
def test_folder_of_another_kind(config: object, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert complaint in refusal_of(str(tmp_path)).message


def test_folder_with_a_damaged_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert "not valid JSON" in refusal_of(str(tmp_path)).message
