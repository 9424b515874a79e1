"""Bundles: what is refused, and that writing one leaves the old bundle or none, at whatever moment it is killed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qcgraph.bundle import (
    MANIFEST,
    Bundle,
    check_output,
    is_bundle,
    readable_json,
    write_plan,
    write_scheduler,
    writing,
)
from qcgraph.bundle import manifest as manifest_module
from qcgraph.bundle.watch import reading
from qcgraph.errors import BundleError, UsageError
from qcgraph.facts import Facts
from qcgraph.files import atomic
from qcgraph.plan.roles import COMPUTES, REUSES, TensorRole
from qcgraph.plan.spec import Interface, ModelSpec, TensorSpec
from qcgraph.plan.steps import Earlier, Fingerprint, Step, StepPlan, Update
from qcgraph.recipe import Recipe

SPEC = ModelSpec.class_conditional("toy", (1, 8, 8), class_count=10, null_class=10, output_channels=1, is_image=True)
PLAN = StepPlan(
    Fingerprint("0123456789abcdef", "ddim", 3, 1.5),
    (
        Step(981.0, Update(1.0123456789012345, -0.1), "full", group=0, row=0),
        Step(961.0, Update(1.1, -0.2), "reuse", group=0, row=1),
        Step(1.0, Update(1.2, -0.3, 0.25, (Earlier(0.1, -1 / 3),)), "full", group=1, row=2),
    ),
    {"full": COMPUTES, "reuse": REUSES},
)
LATENT = SPEC.latent
PREDICTION = TensorSpec("noise_prediction", "f32", ("B", 1, 8, 8), TensorRole.PREDICTION)
INTERFACES = {
    "full": Interface((LATENT,), (PREDICTION,)),
    "reuse": Interface((LATENT, TensorSpec("cache", "f32", ("B", 16, 4), TensorRole.CACHE, "cache")), (PREDICTION,)),
}


def fill(folder: Path, content: str) -> None:
    """What a compilation writes, small."""
    write_plan(folder, SPEC, PLAN, INTERFACES)
    write_scheduler(folder, SPEC, PLAN)
    (folder / "recipe.lock.toml").write_text(Recipe().to_toml())
    (folder / "full.onnx").write_text(content)
    (folder / "ir").mkdir()
    (folder / "ir" / "000_capture.txt").write_text("graph main\n")
    (folder / "ir" / "001_plan-cache.txt").write_text("graph main, planned\n")
    (folder / "ir" / "001_plan-cache.diff").write_text("+planned\n")


def make(path: Path, content: str = "first", *, force: bool = False) -> Bundle:
    with writing(path, model="toy", target="onnxruntime-cpu", force=force) as folder:
        fill(folder, content)
    return Bundle.open(path)


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_round_trip(tmp_path: Path) -> None:
    made = make(tmp_path / "toy")
    assert (made.spec, made.plan, made.interfaces) == (SPEC, PLAN, INTERFACES)
    assert made.recipe == Recipe()
    assert (made.manifest.model, made.manifest.target) == ("toy", "onnxruntime-cpu")
    assert "numpy" in made.manifest.packages
    assert [(text.index, text.name) for text in made.ir_texts] == [(0, "capture"), (1, "plan-cache")]
    assert made.ir_texts[1].text == "graph main, planned\n"
    sizes = {path.name: path.stat().st_size for path in made.path.rglob("*") if path.is_file()}
    assert made.size == sum(sizes.values()) - sizes[MANIFEST]
    assert hidden(tmp_path) == []


def test_can_be_moved(tmp_path: Path) -> None:
    make(tmp_path / "toy")
    (tmp_path / "toy").rename(tmp_path / "elsewhere")
    assert Bundle.open(tmp_path / "elsewhere").plan == PLAN


@pytest.mark.parametrize("history", [(), (Earlier(-1.0123456789012345, 0.12345678901234567),)])
def test_a_step_is_a_line(tmp_path: Path, history: tuple[Earlier, ...]) -> None:
    update = Update(1.0123456789012345, -0.01234567890123456, 0.12345678901234567, history)
    plan = replace(PLAN, steps=tuple(Step(1000.0 - row, update, "reuse", row=row) for row in range(50)))
    write_plan(tmp_path, SPEC, plan, INTERFACES)
    lines = (tmp_path / "plan.json").read_text().splitlines()
    assert [line.count('"timestep"') for line in lines].count(1) == 50
    assert json.loads("\n".join(lines))["format"] == 2


def test_the_scheduler_of_a_plan_is_plain_json(tmp_path: Path) -> None:
    place = make(tmp_path / "toy").file("scheduler/scheduler_config.json")
    data, planned = json.loads(place.read_text()), json.loads((tmp_path / "toy" / "plan.json").read_text())["plan"]
    assert data["_class_name"] == "FittedScheduler"
    assert (data["run_steps"], data["num_train_timesteps"], data["prediction_type"]) == (3, 1000, "epsilon")
    assert data["steps"] == [{key: step[key] for key in ("timestep", "update")} for step in planned["steps"]]


def test_readable_json_is_json() -> None:
    value = {"short": [1, 2], "empty": [], "long": [{"a": "x" * 100, "b": 1e-7}] * 4, "none": None}
    assert json.loads(readable_json(value)) == value


def test_facts_without_a_program(tmp_path: Path) -> None:
    made = make(tmp_path / "toy")
    assert made.facts.encode() == Facts([SPEC, PLAN]).encode()
    assert made.history == ()


def test_facts_and_history_of_a_program(tmp_path: Path) -> None:
    record = {"text": "plan-cache{interval=2}", "changed": True, "refusals": []}
    facts = Facts([SPEC, replace(PLAN, steps=PLAN.steps[:1])])
    with writing(tmp_path / "toy", model="toy", target="torch") as folder:
        fill(folder, "first")
        (folder / "program.json").write_text(json.dumps({"facts": facts.encode(), "history": [record]}))
    made = Bundle.open(tmp_path / "toy")
    assert made.facts.encode() == facts.encode()
    assert made.history == (record,)


@pytest.mark.parametrize("where", [{}, ["x"], 3, None])
def test_a_history_of_another_form_is_refused(tmp_path: Path, where: object) -> None:
    record = {"text": "insert-qdq", "changed": True, "refusals": [{"where": where, "reason": "x"}]}
    with writing(tmp_path / "out", model="toy", target="torch") as folder:
        (folder / "plan.json").write_text("{}")
        (folder / "recipe.lock.toml").write_text("")
        (folder / "program.json").write_text(json.dumps({"facts": {}, "history": [record]}))
    with pytest.raises(BundleError, match=r"refusals\.0\.where"):
        _ = Bundle.open(tmp_path / "out").history


def test_unknown_files_are_tolerated(tmp_path: Path) -> None:
    (make(tmp_path / "toy").path / "note.txt").write_text("mine")
    assert Bundle.open(tmp_path / "toy").plan == PLAN


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (Path.unlink, "the file is missing"),
        (lambda path: path.write_text("fi"), "the file is truncated: 2 of 5 bytes"),
        (lambda path: path.write_text("fIrst"), "the file was changed after it was written"),
        (lambda path: path.write_text("first and more"), "the file was changed: 14 bytes instead of 5"),
    ],
    ids=["missing", "truncated", "changed", "longer"],
)
def test_damaged_file_is_named(tmp_path: Path, harm: object, problem: str) -> None:
    assert callable(harm)
    harm(make(tmp_path / "toy").path / "full.onnx")
    with pytest.raises(BundleError, match=problem) as caught:
        Bundle.open(tmp_path / "toy")
    assert caught.value.where == str(tmp_path / "toy" / "full.onnx")
    assert caught.value.hint
    unchecked = Bundle.open(tmp_path / "toy", check=False)
    damage = list(unchecked.damage())
    assert [(item.file, item.problem) for item in damage] == [("full.onnx", problem)]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        (MANIFEST, "{", "is not valid JSON"),
        (MANIFEST, "[]", "is not of the expected form"),
        (MANIFEST, '{"schema_version": 2}', "Field required"),
        (MANIFEST, '{"schema_version": 3}', "has schema version 3; this qcgraph reads version 2"),
        (MANIFEST, "\xff", "is not valid JSON"),
        ("plan.json", '{"format": 2, "model"', "is not valid JSON"),
        ("plan.json", '{"format": 2}', "is not of the expected form"),
        ("plan.json", '{"format": 9}', "has format 9, not 2"),
        ("plan.json", "[" * 100000, "is nested more than 64 levels deep"),
        ("recipe.lock.toml", "[sampling]\nstepz = 1", "unknown key 'stepz'"),
    ],
)
def test_malformed_file_is_refused(tmp_path: Path, name: str, text: str, problem: str) -> None:
    rewrite(make(tmp_path / "toy").path, name, text)
    with pytest.raises(BundleError, match=problem) as caught:
        read_all(tmp_path / "toy")
    assert caught.value.hint


def test_unchecked_file_is_checked_when_it_is_read(tmp_path: Path) -> None:
    path = make(tmp_path / "toy").path / "plan.json"
    path.write_text(path.read_text().replace("981.0", "982.0"))
    opened = Bundle.open(tmp_path / "toy", check=False)
    assert opened.recipe == Recipe()
    with pytest.raises(BundleError, match="the file was changed"):
        _ = opened.plan


def rewrite(bundle: Path, name: str, text: str) -> None:
    """Write a file anew, and its hash, as a broken version of qcgraph would."""
    (bundle / name).write_text(text)
    if name != MANIFEST:
        manifest = json.loads((bundle / MANIFEST).read_text())
        content = (bundle / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        (bundle / MANIFEST).write_text(json.dumps(manifest))


def read_all(path: Path) -> object:
    opened = Bundle.open(path)
    return opened.plan, opened.recipe


def test_plan_with_rising_timesteps_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "toy").path / "plan.json"
    rewrite(path.parent, path.name, path.read_text().replace("961.0", "991.0"))
    with pytest.raises(BundleError, match="must fall strictly"):
        read_all(tmp_path / "toy")


def test_manifest_cannot_point_outside(tmp_path: Path) -> None:
    path = make(tmp_path / "toy").path / MANIFEST
    path.write_text(path.read_text().replace('"full.onnx"', '"../full.onnx"'))
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.open(tmp_path / "toy")


def test_what_is_asked_to_be_opened(tmp_path: Path) -> None:
    assert is_bundle(make(tmp_path / "toy").path)
    (tmp_path / "toy").rename(tmp_path / ".toy.qcgraph-old")
    assert is_bundle(tmp_path / "toy")
    assert not is_bundle(tmp_path)
    assert not is_bundle("digits")


@pytest.mark.parametrize(
    ("name", "problem"),
    [("absent", "there is no such bundle"), ("file", "is a file"), ("folder", "is not a bundle: it has no manifest")],
)
def test_what_is_no_bundle(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(BundleError, match=problem):
        Bundle.open(tmp_path / name)


def test_missing_graph_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"the bundle has no reuse\.onnx"):
        make(tmp_path / "toy").file("reuse.onnx")


def test_every_bundle_has_a_plan(tmp_path: Path) -> None:
    with (
        pytest.raises(BundleError, match=r"no plan\.json and no recipe\.lock\.toml"),
        writing(tmp_path / "toy", model="toy", target="torch"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


# Where a bundle may be written.


def test_existing_bundle_needs_force(tmp_path: Path) -> None:
    make(tmp_path / "toy", "first")
    with pytest.raises(UsageError, match="exists") as caught:
        make(tmp_path / "toy", "second")
    assert "--force" in (caught.value.hint or "")
    assert make(tmp_path / "toy", "second", force=True).file("full.onnx").read_text() == "second"
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("content", ["notes", '{"schema_version": 1', '{"manifest_version": 3, "files": {}}'])
def test_force_replaces_bundles_only(tmp_path: Path, content: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / MANIFEST).write_text(content)
    with pytest.raises(UsageError, match="is not a bundle"):
        check_output(tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / MANIFEST).read_text() == content


def add_link(folder: Path) -> None:
    (folder / "link").symlink_to(folder / "ir")


STRANGERS = {
    "file": (lambda folder: (folder / "grid.png").touch(), "grid.png, which qcgraph did not write"),
    "hidden file": (lambda folder: (folder / ".env").touch(), ".env, which qcgraph did not write"),
    "hidden folder": (lambda folder: (folder / ".git" / "refs").mkdir(parents=True), ".git/, which qcgraph did not"),
    "nested": (lambda folder: (folder / "ir" / "note.txt").touch(), "ir/note.txt, which qcgraph did not write"),
    "nested folder": (lambda folder: (folder / "ir" / "mine").mkdir(), "ir/mine/, which qcgraph did not write"),
    "link to a folder": (add_link, "link/, which qcgraph did not write"),
    "in the engines": (
        lambda folder: [(folder / "engines").mkdir(), (folder / "engines" / "my.engine").touch()],
        "engines/, which qcgraph did not write",
    ),
    "edited": (
        lambda folder: (folder / "recipe.lock.toml").write_text("# mine\n"),
        "recipe.lock.toml, which was changed after qcgraph wrote it",
    ),
    "linked": (
        lambda folder: [
            (folder / "full.onnx").rename(folder.parent / "full.onnx"),
            (folder / "full.onnx").symlink_to(folder.parent / "full.onnx"),
        ],
        "full.onnx, which qcgraph did not write",
    ),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_force_keeps_what_is_not_ours(tmp_path: Path, name: str) -> None:
    change, said = STRANGERS[name]
    folder = make(tmp_path / "toy").path
    change(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UsageError, match=re.escape(f"holds {said}")) as caught:
        check_output(tmp_path / "toy", force=True)
    assert "move what you want to keep away" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="holds"):
        make(tmp_path / "toy", "second", force=True)
    assert sorted(folder.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_stranger_that_came_while_it_was_written_is_kept(tmp_path: Path) -> None:
    folder = make(tmp_path / "toy").path

    def write() -> None:
        with writing(folder, model="toy", target="torch", force=True) as partial:
            fill(partial, "second")
            (folder / "note.txt").write_text("mine")

    with pytest.raises(UsageError, match=r"holds note\.txt, which qcgraph did not write"):
        write()
    assert (folder / "note.txt").read_text() == "mine"
    assert Bundle.open(folder).file("full.onnx").read_text() == "first"
    assert hidden(tmp_path) == []


def test_many_strangers_are_counted(tmp_path: Path) -> None:
    folder = make(tmp_path / "toy").path
    for name in "abcdef":
        (folder / name).touch()
    with pytest.raises(UsageError, match=r"holds a, which qcgraph did not write, b, .*, and 3 more"):
        check_output(tmp_path / "toy", force=True)


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("text")
    with pytest.raises(UsageError, match="is not a bundle"):
        check_output(tmp_path / "mine", force=True)


def test_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    assert make(tmp_path / "toy").plan == PLAN


def test_place_inside_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        check_output(tmp_path / "file" / "a" / "toy", force=False)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that root cannot write to either")
@pytest.mark.parametrize("place", ["/proc/toy", "/proc/a/toy"])
def test_folder_that_cannot_be_written(place: str) -> None:
    with pytest.raises(UsageError, match="cannot be"):
        check_output(Path(place), force=False)


def test_checking_makes_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b" / "toy", force=False)
    check_output(tmp_path / "toy", force=False)
    assert list(tmp_path.iterdir()) == []


def test_missing_parents_are_made(tmp_path: Path) -> None:
    assert make(tmp_path / "a" / "b" / "toy").plan == PLAN


def test_root_is_no_place() -> None:
    with pytest.raises(UsageError, match="is no place"):
        check_output(Path("/"), force=True)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    make(tmp_path / "real", "first")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    make(tmp_path / "link", "second", force=True)
    assert (tmp_path / "link").is_symlink()
    assert Bundle.open(tmp_path / "real").file("full.onnx").read_text() == "second"


def test_two_writers_are_kept_apart(tmp_path: Path) -> None:
    with writing(tmp_path / "toy", model="toy", target="torch") as folder:
        with pytest.raises(UsageError, match="another process is writing"):
            check_output(tmp_path / "toy", force=True)
        fill(folder, "first")
    assert Bundle.open(tmp_path / "toy").plan == PLAN


# Interruptions.


def interrupted(place: Path, error: type[BaseException]) -> None:
    with writing(place, model="toy", target="torch", force=True) as folder:
        fill(folder, "second")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failure_keeps_the_old_bundle(tmp_path: Path, error: type[BaseException]) -> None:
    make(tmp_path / "toy", "first")
    with pytest.raises(error):
        interrupted(tmp_path / "toy", error)
    assert Bundle.open(tmp_path / "toy").file("full.onnx").read_text() == "first"
    assert hidden(tmp_path) == []


# A process that is started in the background may ignore SIGINT, and so may what it starts.
WRITER = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {tests!r})
import test_bundle
{patch}
from qcgraph.bundle import writing
with writing(Path({place!r}), model="toy", target="torch", force=True) as folder:
    test_bundle.fill(folder, "second")
    {body}
"""
SAY_AND_SLEEP = "print('now', flush=True); time.sleep(60)"
# Sleeps before the second of the two renames of a replacement, when nothing is in place.
BETWEEN_RENAMES = """
from qcgraph.files import atomic
atomic._exchanged = lambda one, other: False
rename = Path.rename
def slow(self, other):
    if self.name.endswith("-partial"):
        print("now", flush=True)
        time.sleep(60)
    return rename(self, other)
Path.rename = slow
"""


def kill_writer(place: Path, number: signal.Signals, *, patch: str, body: str) -> None:
    """Start a process that replaces a bundle, and send it a signal when it says "now"."""
    code = WRITER.format(tests=str(Path(__file__).parent), place=str(place), patch=patch, body=body)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"now\n"
        process.send_signal(number)
        assert process.wait(30) != 0


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["filling", "renaming"])
def test_killed_while_replacing(tmp_path: Path, number: signal.Signals, moment: str) -> None:
    make(tmp_path / "toy", "first")
    patch, body = (BETWEEN_RENAMES, "pass") if moment == "renaming" else ("", SAY_AND_SLEEP)
    kill_writer(tmp_path / "toy", number, patch=patch, body=body)
    assert Bundle.open(tmp_path / "toy").file("full.onnx").read_text() == "first"
    make(tmp_path / "toy", "third", force=True)
    assert Bundle.open(tmp_path / "toy").file("full.onnx").read_text() == "third"
    assert hidden(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_killed_while_writing_the_first(tmp_path: Path) -> None:
    kill_writer(tmp_path / "toy", signal.SIGKILL, patch="", body=SAY_AND_SLEEP)
    with pytest.raises(BundleError, match="there is no such bundle"):
        Bundle.open(tmp_path / "toy")
    make(tmp_path / "toy")
    assert hidden(tmp_path) == []


def test_old_bundle_is_kept_where_something_else_took_its_place(tmp_path: Path) -> None:
    make(tmp_path / "toy").path.rename(tmp_path / ".toy.qcgraph-old")
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "mine.txt").touch()
    with pytest.raises(UsageError, match="is not a bundle"):
        check_output(tmp_path / "toy", force=True)
    assert hidden(tmp_path) == [".toy.qcgraph-old"]


def test_versions_come_from_what_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(manifest_module, "PACKAGES", ("numpy", "no-such-package"))
    assert list(make(tmp_path / "toy").manifest.packages) == ["numpy"]


# Readers beside a writer.

REPLACER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_bundle
from qcgraph.files import atomic
if {two_renames}:
    atomic._exchanged = lambda one, other: False
print("now", flush=True)
for number in range(100000):
    test_bundle.make(Path({place!r}), f"content {{number}}", force=True)
"""


def read_beside(place: Path) -> None:
    """Open a bundle while it is replaced over and over, until it was there in four versions."""
    hashes: set[str] = set()
    opened_times = 0
    while opened_times < 150 or len(hashes) < 4:  # on a busy machine it takes longer to see four of them
        opened_times += 1
        try:
            opened = Bundle.open(place, check=bool(opened_times % 2))
            hashes.add(opened.manifest.files["full.onnx"].sha256)
            assert (opened.plan, opened.recipe) == (PLAN, Recipe())
            assert any(is_bundle(place) for _ in range(3))  # between two renames there is none for a moment
        except BundleError as error:  # where it was replaced more often than opening tries again
            assert error.message == "was replaced while it was read"  # noqa: PT017 - most often there is none


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be replaced there")
@pytest.mark.parametrize("two_renames", [False, True], ids=["exchange", "two renames"])
def test_a_reader_beside_a_writer_sees_the_old_or_the_new(tmp_path: Path, two_renames: bool) -> None:
    make(tmp_path / "toy", "content")
    code = REPLACER.format(tests=str(Path(__file__).parent), place=str(tmp_path / "toy"), two_renames=two_renames)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"now\n"
        try:
            read_beside(tmp_path / "toy")
            assert process.poll() is None
        finally:
            process.kill()
    assert make(tmp_path / "toy", "last", force=True).plan == PLAN
    assert hidden(tmp_path) == []


def test_a_bundle_that_was_replaced_after_it_was_opened_says_so(tmp_path: Path) -> None:
    opened = make(tmp_path / "toy")
    make(tmp_path / "toy", "second", force=True)
    assert opened.plan == PLAN  # read when it was opened
    (tmp_path / "toy" / "ir" / "000_capture.txt").write_text("another\n")
    with pytest.raises(BundleError, match="was replaced while it was read"):
        _ = opened.ir_texts


# What a stranger may put into the files of a bundle.


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def leading_out(path: Path) -> None:
    copied = path.parent.parent / path.name
    path.rename(copied)
    path.symlink_to(copied)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes")
@pytest.mark.parametrize("name", [MANIFEST, "plan.json", "recipe.lock.toml", "full.onnx"])
@pytest.mark.parametrize("harm", [fifo, loop, leading_out, as_folder, device])
def test_only_regular_files_of_the_bundle_are_read(tmp_path: Path, name: str, harm: Callable[[Path], None]) -> None:
    harm(make(tmp_path / "toy").path / name)
    with pytest.raises(BundleError) as caught:
        read_all(tmp_path / "toy")
    assert caught.value.hint
    assert not list((tmp_path / "toy").glob(".*"))
    with pytest.raises(UsageError):
        check_output(tmp_path / "toy", force=True)


DIGEST = "0" * 64
DEEP = '{"schema_version": 2, "qcgraph": "1", "files": ' + '{"a": ' * 100000


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (MANIFEST, DEEP),
        (MANIFEST, "[" * 500),
        (MANIFEST, '{"schema_version": ' + "1" * 5000 + "}"),
        (MANIFEST, '{"schema_version": NaN}'),
        (MANIFEST, '{"schema_version": true}'),
        (MANIFEST, '{"schema_version": [1]}'),
        (MANIFEST, '{"schema_version": 1, "schema_version": 1}'),
        ("plan.json", '{"format": 2, "model": {}, "plan": [[[]]], "variants": 7}'),
        ("plan.json", "null"),
        ("plan.json", '{"format": 1e400}'),
        ("report.json", "[]"),
        ("report.json", '{"schema_version": true}'),
        ("report.json", '{"schema_version": 1, "model": 7}'),
        ("report.json", '{"source": ' * 5000),
        ("recipe.lock.toml", "steps = " + "1" * 5000),
        ("recipe.lock.toml", "a = " + "[" * 5000),
    ],
    ids=lambda value: value[:40],
)
def test_odd_files_are_refused_in_words(tmp_path: Path, name: str, text: str) -> None:
    path = make(tmp_path / "toy").path
    rewrite(path, name, text)
    with pytest.raises(BundleError) as caught:
        _ = (read_all(path), Bundle.open(path).report)
    assert caught.value.hint
    assert len(str(caught.value)) < 1000
    if name == MANIFEST:
        with pytest.raises(UsageError, match="is not a bundle"):
            check_output(path, force=True)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda data: data["files"].update({"../../etc/passwd": data["files"]["plan.json"]}), "outside the bundle"),
        (lambda data: data["files"].update({"/etc/passwd": data["files"]["plan.json"]}), "outside the bundle"),
        (lambda data: data["files"].update({"": data["files"]["plan.json"]}), "not the plain path"),
        (lambda data: data["files"].update({"a\0b": data["files"]["plan.json"]}), "which is no character"),
        (lambda data: data["files"].update({"\ud800": data["files"]["plan.json"]}), "which is no character"),
        (lambda data: data["files"].update({"x" * 5000: data["files"]["plan.json"]}), "File name too long"),
        (lambda data: data["files"].update({"ir/./a": data["files"]["plan.json"]}), "not the plain path"),
        (lambda data: data["files"].pop("plan.json"), r"names no plan\.json"),
        (lambda data: data["files"]["plan.json"].update(bytes=-1), "greater than or equal to 0"),
        (lambda data: data["files"]["plan.json"].update(bytes=10**400), "more than 64 bits"),
        (lambda data: data["files"]["plan.json"].update(sha256="../x"), "pattern"),
    ],
)
def test_odd_manifests(tmp_path: Path, change: Callable[[dict[str, Any]], object], problem: str) -> None:
    path = make(tmp_path / "toy").path / MANIFEST
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(BundleError, match=problem):
        Bundle.open(path.parent)


def test_a_manifest_of_a_million_entries_is_refused_at_once(tmp_path: Path) -> None:
    path = make(tmp_path / "toy").path / MANIFEST
    with path.open("w") as stream:
        stream.write('{"files": {')
        stream.writelines(f'"{index:0100}": 1,' for index in range(10**6))
    with pytest.raises(BundleError, match="is larger than 64 MiB"):
        Bundle.open(path.parent)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"count": 10', '"count": 1000000000000', "1000000000000 values of class_label"),
        ('"count": 10', '"count": -1', "-1 values of class_label"),
        ('"shape": [], "count"', '"shape": [1000000, 1000000], "count"', "is no condition"),
        ("[1, 8, 8]", "[1, 1000000, 1000000]", "a latent of"),
        ("[1, 8, 8]", "[0, 8, 8]", "a latent of"),
        ('"group": 1', '"group": 1000000000000', "a group or a row"),
        ('"row": 2', '"row": -1', "a group or a row"),
        ("-0.1", "NaN", "holds NaN, which is no finite number"),
        ("-0.1", "1e999", "holds 1e999, which is no finite number"),
        ('"variant": "reuse"', '"variant": "other"', "a step runs 'other', which is no variant of steps"),
        ('"reuse": {\n      "inputs"', '"../../x": {\n      "inputs"', "no name of a variant"),
    ],
)
def test_numbers_that_no_plan_has(tmp_path: Path, old: str, new: str, problem: str) -> None:
    path = make(tmp_path / "toy").path / "plan.json"
    assert old in path.read_text()
    rewrite(path.parent, path.name, path.read_text().replace(old, new, 1))
    with pytest.raises(BundleError, match=problem):
        read_all(tmp_path / "toy")


# What is on the disk when.


def test_all_is_on_the_disk_before_the_old_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "toy", "first")
    events: list[str] = []

    def noting(name: str, path_of: Callable[..., Path]) -> None:
        call = getattr(atomic, name)

        def noted(*arguments: Any) -> Any:
            events.append(f"{name} {path_of(*arguments).relative_to(tmp_path)}")
            return call(*arguments)

        monkeypatch.setattr(atomic, name, noted)

    noting("_sync", lambda path: path)
    noting("_exchanged", lambda one, other: one)
    noting("_remove", lambda path: path)
    monkeypatch.setattr(Path, "rename", _noted_rename(events, tmp_path))
    make(tmp_path / "toy", "second", force=True)
    partial = ".toy.qcgraph-partial"
    synced = {event for event in events[: events.index(f"_exchanged {partial}")] if event.startswith("_sync")}
    files = {path.relative_to(tmp_path / "toy") for path in (tmp_path / "toy").rglob("*")}
    assert {f"_sync {partial}/{name}" for name in files} | {f"_sync {partial}"} <= synced
    after = events[events.index(f"_exchanged {partial}") :]
    assert after.index("_sync .") < after.index(f"_remove {partial}")


def _noted_rename(events: list[str], root: Path) -> Callable[[Path, Path], Path]:
    rename = Path.rename

    def noted(self: Path, target: Path) -> Path:
        events.append(f"rename {self.relative_to(root)} {target.relative_to(root)}")
        return rename(self, target)

    return noted


def test_without_exchange_the_old_waits_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "toy", "first")
    events: list[str] = []
    monkeypatch.setattr(atomic, "_exchanged", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", _noted_rename(events, tmp_path))
    make(tmp_path / "toy", "second", force=True)
    assert [event.replace("qcgraph-", "") for event in events] == [
        "rename toy .toy.old",
        "rename .toy.partial toy",
        "rename .toy.old .toy.gone",
    ]
    assert hidden(tmp_path) == []


def test_a_place_that_was_emptied_gets_back_what_was_moved_aside(tmp_path: Path) -> None:
    make(tmp_path / "toy", "first").path.rename(tmp_path / ".toy.qcgraph-old")
    (tmp_path / "toy").mkdir()
    with pytest.raises(UsageError, match="exists"):
        check_output(tmp_path / "toy", force=False)
    assert Bundle.open(tmp_path / "toy").file("full.onnx").read_text() == "first"


def test_what_is_half_removed_is_never_put_back(tmp_path: Path) -> None:
    make(tmp_path / "toy", "first").path.rename(tmp_path / ".toy.qcgraph-gone")
    check_output(tmp_path / "toy", force=False)
    assert list(tmp_path.iterdir()) == []


def test_what_a_library_says_of_a_bundle_that_goes_is_put_in_words(tmp_path: Path) -> None:
    bundle = make(tmp_path / "b")
    with pytest.raises(FileNotFoundError), reading(bundle):
        (bundle.path / "nothere").read_text()
    with pytest.raises(BundleError, match="replaced, changed or deleted while it was verified") as error:
        read_after_removal(bundle)
    assert error.value.hint == "do it again"


def read_after_removal(bundle: Bundle) -> None:
    with reading(bundle, done="verified"):
        shutil.rmtree(bundle.path)
        (bundle.path / MANIFEST).read_text()
