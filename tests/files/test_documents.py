from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from qcgraph.errors import BundleError, UsageError
from qcgraph.files.documents import MOST_LEVELS, is_text, parse_json, parse_toml, read_json, read_text, read_toml

HINT = "make it again"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "nested"),
        ('{"a":' * 100_000, "nested"),
        ("[" * (MOST_LEVELS + 1) + "]" * (MOST_LEVELS + 1), "nested"),
        ("1" * 4301, "more than 64 bits"),
        (str(2**65), "more than 64 bits"),
        ('{"a": [NaN]}', "'NaN'|NaN, which is no finite number"),
        ("-Infinity", "-Infinity, which is no finite number"),
        ("1e400", "1e400, which is no finite number"),
        ('{"a": {"b": 1, "b": 2}}', "says 'b' twice"),
        (r'"\ud800"', "no character"),
        (r'{"\udfff": 1}', "no character"),
        (r'["\u0000"]', "no character"),
    ],
)
def test_json_is_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(BundleError, match=said) as caught:
        parse_json(text, where="f.json", hint=HINT, error=BundleError)
    assert (caught.value.where, caught.value.hint) == ("f.json", HINT)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a = ", "is not valid TOML"),
        ("steps = " + "1" * 4301, "more than 64 bits"),
        ("steps = 0x" + "f" * 40_000, "more than 64 bits"),
        ("a = " + "[" * 500, "nested"),
        ("a = " + "[" * 500 + "]" * 500, "nested"),
        ("a = " + "[" * (MOST_LEVELS + 1) + "]" * (MOST_LEVELS + 1), "nested"),
        (".".join(["a"] * 100_000) + " = 1", "nested"),
        ("x = {" + ' . "b-c"'.join(['"a"'] * 100) + " = 1}", "nested"),
        (r'a = "\u0000"', "no character"),
        ("a = 1\na = 2", "is not valid TOML"),
    ],
)
def test_toml_is_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse_toml(text, where="f.toml", hint=HINT)
    assert (caught.value.where, caught.value.hint) == ("f.toml", HINT)


def test_what_is_well_formed_is_read(tmp_path: Path) -> None:
    path = tmp_path / "f"
    deep = "[" * MOST_LEVELS + "]" * MOST_LEVELS
    path.write_text(deep, "utf-8")
    assert str(read_json(path, hint=HINT)) == deep
    path.write_text(r'{"a": [1, 2.5, -0.0, "\ud83d\ude00", "\\u0000"]}', "utf-8")
    assert read_json(path, hint=HINT) == {"a": [1, 2.5, -0.0, "\U0001f600", "\\u0000"]}
    path.write_bytes(b"\xef\xbb\xbfa.b = 'x'\nc = 1e3\n")
    assert read_toml(path, hint=HINT) == {"a": {"b": "x"}, "c": 1000.0}


def test_files_that_cannot_be_read_are_refused_in_words(tmp_path: Path) -> None:
    loop, pipe, latin, large = (tmp_path / name for name in ("loop", "pipe", "latin", "large"))
    loop.symlink_to(loop)
    os.mkfifo(pipe)
    latin.write_bytes(b"a = '\xff'")
    large.write_bytes(b" " * (2**20 + 1))
    for path, said in (
        (tmp_path / "none", "there is no such file"),
        (tmp_path, "is a folder"),
        (loop, "cannot be read: Too many levels"),
        (pipe, "is a pipe or a device"),
        (Path("/dev/zero"), "is a pipe or a device"),
        (tmp_path / ("x" * 5000), "cannot be read: File name too long"),
        (latin / "below", "cannot be read: Not a directory"),
        (Path("a\0b"), "cannot be the name of a file"),
        (Path("a\ud800b"), "cannot be the name of a file"),
        (latin, "is not UTF-8 text, at byte 5"),
        (large, "is larger than 1 MiB"),
    ):
        with pytest.raises(UsageError, match=re.escape(said)) as caught:
            read_text(path, hint=HINT, most_bytes=2**20)
        assert caught.value.hint == HINT
        assert caught.value.where


def test_text_is_what_can_be_encoded() -> None:
    assert [is_text(value) for value in ("", "a\n\x1b\U0001f600", "a\0", "\udcff")] == [True, True, False, False]
