"""Make the inputs of tools/fuzz.py: valid samples that are damaged, and texts drawn from the grammars of qcgraph."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import re
import zipfile
from collections.abc import Sequence
from typing import Any

# Tokens that replace a number, a word or a value.
NUMBERS = json.loads('["0", "-1", "1", "2", "0.0", "-0.0", "1.5", "00", "1_0", "0x10", "1e400", "-1e400", "1e-320"]')
NUMBERS += ["nan", "inf", "true", '"8"', "[]", "{}", "\u0663", "9" * 30, "9" * 4301, str(2**31), str(2**63), str(2**64)]
WORDS = json.loads('["null", "true", "all", "off", "auto", "..", "/", "a/b", "-", "--", "{", "}", "[", "]", "=", ","]')
WORDS += json.loads(
    r'["", " ", "\n", "\"", "\\", ":", "%s", "\u00e9", "\ud83d\ude00", "\udcff", "\u0000", "\u001b[31m"]'
)
WORDS += ["x" * 5000]
VALUES = json.loads('[null, true, false, 0, -1, 1, 2, 0.0, -0.5, 1e308, "", "x", "0", "../x", [], {}, [[]], [0]]')
VALUES += [2**31, 2**63, 10**30, 1e-320, {"": None}, ["x"] * 50, list(range(100)), {"a": {"b": {}}}, "\0", "\xe9"]


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat or insert bytes."""
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        if not data:
            return rng.randbytes(rng.randrange(20))
        at, length = rng.randrange(len(data)), rng.choice([1, 1, 2, 4, 8, 64, len(data)])
        match rng.randrange(6):
            case 0:
                data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
            case 1:
                data = data[:at]
            case 2:
                data = data[:at] + data[at + length :]
            case 3:
                data = data[: at + length] + data[at : at + length] + data[at + length :]
            case 4:
                data = data[:at] + rng.randbytes(min(length, 64)) + data[at:]
            case _:
                data = (
                    data[:at] + rng.choice([b"\0", b"\xff", b"\xed\xa0\x80", b"\r", b"\n", b"\xef\xbb\xbf"]) + data[at:]
                )
    return data


def damage_weights(rng: random.Random, data: bytes) -> bytes:
    """Damage a file of weights, half of the time inside of its container, with valid checksums and lengths."""
    if rng.random() < 0.5:
        return damage_bytes(rng, data)
    return _damage_archive(rng, data) if data.startswith(b"PK") else _damage_header(rng, data)


def _damage_archive(rng: random.Random, data: bytes) -> bytes:
    """Damage or remove a member of a zip archive, most often the pickle."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(written, "w") as target:
        names = source.namelist()
        chosen = rng.choice([*names, *[name for name in names if name.endswith(".pkl")] * 3 * len(names)])
        for name in names:
            if name != chosen:
                target.writestr(name, source.read(name))
            elif rng.random() < 0.95:
                target.writestr(name, damage_bytes(rng, source.read(name)))
    return written.getvalue()


def _damage_header(rng: random.Random, data: bytes) -> bytes:
    """Damage the JSON header of a safetensors file; damage any other file anywhere."""
    end = 8 + int.from_bytes(data[:8], "little")
    if data[8:9] != b"{" or end > len(data):
        return damage_bytes(rng, data)
    header = json.dumps(damage_json(rng, json.loads(data[8:end]))).encode("utf-8", "surrogatepass")
    return len(header).to_bytes(8, "little") + header + data[end:]


_TOKEN = re.compile(r"[A-Za-z_]+|[0-9.]+|\s+|.", re.DOTALL)


def damage_text(rng: random.Random, text: str, others: Sequence[str] = ()) -> str:
    """Swap tokens for tokens of the same or another kind, repeat or drop tokens, or nest deeply."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        tokens = _TOKEN.findall(text) or [""]
        at = rng.randrange(len(tokens))
        match rng.randrange(10):
            case 0 | 1 | 2:
                numbers = [index for index, token in enumerate(tokens) if token[:1].isdigit()] or [at]
                tokens[rng.choice(numbers)] = rng.choice(NUMBERS)
            case 3 | 4:
                tokens[at] = rng.choice(WORDS)
            case 5:
                del tokens[at : at + rng.choice([1, 1, 2, 5])]
            case 6:
                tokens[at:at] = tokens[at : at + rng.choice([1, 3, 10])] * rng.choice([1, 1, 50])
            case 7:
                tokens[at] = rng.choice("[{(") * rng.choice([1, 70, 500, 3000]) + rng.choice(
                    ["", tokens[at], "]" * 500]
                )
            case 8:
                lines = text.split("\n")
                lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
                tokens = ["\n".join(lines)]
            case _:
                other = rng.choice(others) if others else text
                tokens[at:] = _TOKEN.findall(other)[rng.randrange(len(_TOKEN.findall(other)) or 1) :]
        text = "".join(tokens)[:200_000]
    return text


def damage_json(rng: random.Random, data: Any) -> Any:
    """Replace, drop, rename or add a value somewhere in a copy of JSON data, or nest a value deeply."""
    data = json.loads(json.dumps(data))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places: list[tuple[Any, Any]] = []
        level = [data]
        while level:
            inner = []
            for value in level:
                keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
                places += [(value, key) for key in keys]
                inner += [value[key] for key in keys]
            level = inner
        if not places:
            return copy.deepcopy(rng.choice(VALUES))
        owner, key = rng.choice(places)
        match rng.randrange(6):
            case 0:
                del owner[key]
            case 1 if isinstance(owner, dict):
                owner[rng.choice([*WORDS[:15], f"{key}x"])] = owner.pop(key)
            case 2:
                other, name = rng.choice(places)
                with contextlib.suppress(LookupError):
                    owner[key] = json.loads(json.dumps(other[name]))
            case 3:
                nest = owner[key]
                for _ in range(rng.choice([1, 70, 400])):
                    nest = [nest]
                owner[key] = nest
            case _:
                owner[key] = copy.deepcopy(rng.choice(VALUES))
    return data


def json_bytes(rng: random.Random, data: Any) -> bytes:
    """Write JSON data as a file would contain it, sometimes with damaged text."""
    text = json.dumps(damage_json(rng, data))
    if rng.random() < 0.3:
        text = damage_text(rng, text)
    content = text.encode("utf-8", "surrogateescape")
    return damage_bytes(rng, content) if rng.random() < 0.1 else content


SECTIONS: dict[str, dict[str, Any]] = {}  # the sections of the default recipe


def draw_recipe(rng: random.Random) -> bytes:
    """Draw a recipe of existing sections and keys, or a damaged preset."""
    from qcgraph.recipe import PRESETS, Recipe

    presets = [path.read_text("utf-8") for path in sorted(PRESETS.glob("*.toml"))]
    text = rng.choice([*presets, Recipe().to_toml()])
    if rng.random() < 0.5:
        SECTIONS.update(SECTIONS or Recipe().model_dump())
        lines = []
        for section in rng.sample(sorted(SECTIONS), rng.randrange(1, 5)):
            lines.append(f"[{section}]")
            for key in rng.sample(sorted(SECTIONS[section]), rng.randrange(len(SECTIONS[section]) + 1)):
                known = json.dumps(SECTIONS[section][key])
                lines.append(
                    f"{key} = {rng.choice([known, known, rng.choice(NUMBERS), json.dumps(draw_schedule(rng))])}"
                )
        text = "\n".join(lines)
    return text_bytes(rng, text if rng.random() < 0.2 else damage_text(rng, text, presets))


def draw_pipeline(rng: random.Random) -> bytes:
    """Draw the damaged default pipeline, or known passes with some of their options."""
    from dataclasses import fields

    from qcgraph.compiler.default_pipeline import default_pipeline
    from qcgraph.export.targets import TARGETS
    from qcgraph.pipeline import registry
    from qcgraph.recipe import Recipe

    target = TARGETS[rng.choice(sorted(TARGETS))]
    cache, solver = rng.choice(["off", "interval=3", "budget=0.3"]), rng.choice(["as-is", "fitted=5"])
    text = default_pipeline(Recipe().override(cache=cache, solver=solver), target).text
    if rng.random() < 0.6:
        parts = []
        for name in rng.choices(sorted(registry()), k=rng.randrange(1, 4)):
            known = [item.name.replace("_", "-") for item in fields(registry()[name])]
            options = [
                f"{key}={rng.choice([*NUMBERS, *map(json.dumps, WORDS[:15]), 'auto', draw_schedule(rng)])}"
                for key in rng.sample(known, rng.randrange(len(known) + 1))
            ]
            parts.append(f"{name}{{{' '.join(options)}}}" if options else name)
        text = ",".join(parts)
    return text_bytes(rng, text if rng.random() < 0.3 else damage_text(rng, text))


def draw_schedule(rng: random.Random) -> str:
    """Draw a schedule, bits, blocks or a gate: a text in one of the small languages."""
    number = lambda: rng.choice([*NUMBERS, str(rng.randrange(1200)), f"{rng.uniform(0, 1000):.3f}"])  # noqa: E731
    run = lambda: f"{number()}-{number()}:{''.join(rng.choices('FRC123x', k=rng.randrange(1, 20)))}"  # noqa: E731
    return rng.choice(
        [
            f"plan={'+'.join(run() for _ in range(rng.randrange(1, 4)))}",
            f"plan=980-20:F{'R' * rng.randrange(48)}",
            f"interval={number()}",
            f"dps={number()}",
            f"budget={number()}",
            f"budget=.{'1' * rng.choice([1, 5, 10**5])}{rng.choice(['', 'x'])}",
            f"w{rng.randrange(10)}a{rng.randrange(10)}",
            f"auto={number()}",
            f"fitted={number()}",
            f"{number()}..{number()}+guidance",
            f"psnr>={number()},accuracy_drop<={number()}",
            f"{rng.choice(['psnr', 'ssim', 'fid_small', 'foo', ''])}{rng.choice(['>=', '<', '=', ''])}{number()}",
        ]
    )


def text_bytes(rng: random.Random, text: str) -> bytes:
    content = text.encode("utf-8", "surrogatepass" if rng.random() < 0.5 else "replace")
    return damage_bytes(rng, content) if rng.random() < 0.1 else content
