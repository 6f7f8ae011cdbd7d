"""Damaged workspaces, made from the kinds' schemas, and what the readers make of them.

A workspace holds an artifact of every kind.  A case damages one file of one of them; the consumers
(commands, the listing, the app's pages) then read the workspace, each case in a process of its own.
Whatever was done to the file, a consumer may refuse it in at most three lines that name it, leave
it out or make it anew and say so, or give the result that it gives without the damage.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import tempfile
import time
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, RootModel
from typing_extensions import is_typeddict

from resa_lens.artifacts.artifact import KINDS, Kind
from resa_lens.artifacts.manifest import MANIFEST, SCHEMA_VERSION, Manifest, sealed
from resa_lens.artifacts.workspace import Workspace
from resa_lens.hashes import digest, file_hash

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "workspace"
MODEL = ("--model", "tiny-reasoner", "--threads", "1")
SMALL = ("--tokens", "1024", "--latents", "32")
SAES = ("--layers", "3-5", *SMALL)
RECOMMEND = ("recommend-layers", *MODEL, *SAES)
ASKED = ("--limit", "4", "--max-new-tokens", "8")
TUNE = ("tune", *MODEL, *SMALL, "--steps", "2", "--rank", "2", *ASKED)
LAYER = "layers.4.mlp"
"""Of the SAEs, the folder that is damaged."""
SPARSE = 3 * 2**30
"""Bytes of the file that is nearly all hole."""


INGREDIENTS: dict[str, Any] = {
    "recipe": 1, "model": {"weights": "0" * 64}, "dtype": "float32", "config": {}, "data": {},
    "parents": {},
}  # fmt: skip


# A workspace of every kind


def build(root: Path) -> None:
    """Fill a workspace: a real chain from SAEs to scores, golden artifacts, and the smallest ones.

    Call it in a process of its own: the readers are forked from one that has computed nothing.
    """
    for arguments in (RECOMMEND, TUNE):
        outcome = command([*arguments, "--json"], root)
        assert outcome.exit == 0, outcome
    for file in sorted(GOLDEN.rglob(MANIFEST)):
        if not (root / file.relative_to(GOLDEN)).parent.exists():
            _verifiable_copy(file.parent, root)
    there = {artifact.manifest.kind for artifact in Workspace(root).artifacts()}
    for kind in KINDS.values():
        if kind.name not in there:
            smallest(root, kind)


def _verifiable_copy(folder: Path, root: Path) -> None:
    """Copy an artifact of the first schema, with the identity that today's would have."""
    target = root / folder.relative_to(GOLDEN)
    shutil.copytree(folder, target)
    old = json.loads((folder / MANIFEST).read_text())
    kind = KINDS[old["kind"]]
    if any(not (folder / name).exists() for name in kind.files):
        for name, schema in kind.files.items():
            if not (folder / name).exists():
                _write_example(target / name, schema)
    ingredients = {**INGREDIENTS, "kind": kind.name, "data": {"golden": digest(old)}}
    seal(target, {**old, "schema_version": SCHEMA_VERSION, "ingredients": ingredients})


def smallest(root: Path, kind: type[Kind]) -> None:
    """Write an artifact of a kind with the least that its schemas take."""
    parts = ("m-00000000", "run") if kind.by_model else ("run",)
    manifest = Manifest(
        kind=kind.name,
        identity=digest(kind.name),
        config=example(kind.Settings),
        results=example(kind.Results),
        hashes={"weights": "0" * 64},
    )
    space = Workspace(root)
    with space.artifact(space.path(kind.folder, *parts), manifest) as folder:
        for name, schema in kind.files.items():
            _write_example(folder / name, schema)
        if not kind.files:
            (folder / "model.safetensors").write_bytes(b"x")
    place = space.path(kind.folder, *parts)
    value = json.loads((place / MANIFEST).read_text())
    seal(place, {**value, "ingredients": {**INGREDIENTS, "kind": kind.name}})


def seal(folder: Path, value: dict[str, Any]) -> None:
    """Write a manifest that agrees with itself and with the files that are there."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != MANIFEST]
    value["files"] = {str(f.relative_to(folder)): file_hash(f, cached=False) for f in files}
    value["identity"] = digest(value["ingredients"])
    value.pop("checksum", None)
    whole = sealed(Manifest.model_validate(value))
    (folder / MANIFEST).write_text(json.dumps(whole, indent=2))


def _write_example(file: Path, schema: Any) -> None:
    if isinstance(schema, pa.Schema):
        rows = [{f.name: _arrow_example(f.type) for f in schema} for _ in range(2)]
        pq.write_table(pa.Table.from_pylist(rows, schema), file)
    elif schema is None:
        file.write_bytes(b"x")
    else:
        file.write_text(json.dumps(example(schema)))


def _arrow_example(type_: pa.DataType) -> Any:
    if pa.types.is_list(type_):
        return [_arrow_example(type_.value_type)]
    if pa.types.is_struct(type_):
        return {f.name: _arrow_example(f.type) for f in type_}
    if pa.types.is_boolean(type_):
        return True
    if pa.types.is_integer(type_):
        return 1
    return 0.5 if pa.types.is_floating(type_) else "text"


def example(schema: Any) -> Any:
    """Return the JSON of a small value that a schema takes: every field is there."""
    origin, arguments = typing.get_origin(schema), typing.get_args(schema)
    if isinstance(schema, type) and issubclass(schema, RootModel):
        return example(schema.model_fields["root"].annotation)
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        named = schema.model_fields.items()
        return {item.alias or name: example(item.annotation) for name, item in named}
    if is_typeddict(schema):
        return {name: example(hint) for name, hint in typing.get_type_hints(schema).items()}
    if origin in (types.UnionType, typing.Union):
        return example(next(part for part in arguments if part is not types.NoneType))
    if origin is typing.Literal:
        return arguments[0]
    if origin is list:
        return [example(arguments[0])]
    if origin is dict:
        return {str(example(arguments[0])): example(arguments[1])}
    if origin is tuple:
        return [example(part) for part in arguments if part is not Ellipsis]
    plain = {str: "text", bool: True, int: 1, float: 0.5}
    return plain.get(schema)


# Cases


Change = Callable[[Path, random.Random], None]


@dataclass(frozen=True)
class Case:
    """One damage of one file."""

    kind: str
    folder: str
    """Of the artifact, below the workspace."""
    file: str
    """Below that; "" of the folder itself."""
    what: str
    change: Change = field(repr=False)
    forged: bool = False
    """Whether the manifest agrees with what is there: then nobody can know, but nobody may fall."""

    @property
    def name(self) -> str:
        """What tells the case from all others."""
        return f"{self.kind}: {self.file or 'folder'} {self.what}"

    def apply(self, root: Path) -> None:
        """Damage a workspace whose files are links to those of another."""
        path = root / self.folder / self.file
        self.change(path, random.Random(self.name))


def fresh(path: Path, content: bytes) -> None:
    """Write a new file in a file's place: the old one is a link to another workspace's."""
    path.unlink()
    path.write_bytes(content)


def _flipped(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    fresh(path, bytes(content))


def _hollow(path: Path, _: random.Random) -> None:
    fresh(path, path.read_bytes()[:100])
    with path.open("r+b") as stream:
        stream.truncate(SPARSE)


def _replaced(make: Callable[[Path], Any]) -> Change:
    def change(path: Path, _: random.Random) -> None:
        path.unlink()
        make(path)

    return change


def _written(content: bytes) -> Change:
    return lambda path, _: fresh(path, content)


ANY_FILE: dict[str, Change] = {
    "is missing": _replaced(lambda path: None),
    "is empty": _written(b""),
    "is cut": lambda path, _: fresh(path, path.read_bytes()[: path.stat().st_size // 2]),
    "has a byte more": lambda path, _: fresh(path, path.read_bytes() + b" "),
    "has a flipped bit": _flipped,
    "is zeros": lambda path, _: fresh(path, bytes(path.stat().st_size)),
    "is no UTF-8": _written(b"\xff\xfe\x00\xd8" * 64),
    "is a folder": _replaced(Path.mkdir),
    "is a pipe": _replaced(os.mkfifo),
    "is a device": _replaced(lambda path: path.symlink_to("/dev/zero")),
    "is a circle": _replaced(lambda path: path.symlink_to(path)),
    "leads nowhere": _replaced(lambda path: path.symlink_to("/nowhere/at/all")),
    "is 3 GB of nothing": _hollow,
}
"""What can be done to a file, whatever it holds."""
if os.geteuid() != 0:
    ANY_FILE["may not be read"] = lambda path, _: (
        fresh(path, path.read_bytes()), path.chmod(0)
    )[0]  # fmt: skip

JSON_FILE: dict[str, Change] = {
    "is nested deeply": _written(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "is a number of 5,000 digits": _written(b'{"layers": ' + b"9" * 5000 + b"}"),
    "is null": _written(b"null"),
    "is a list": _written(b"[1, 2]"),
    "is a text": _written(b'"text"'),
}
"""What can be done to a JSON file besides."""


def _deep() -> Any:
    value: Any = 1
    for _ in range(400):
        value = [value]
    return value


WRONG: dict[str, Any] = {
    "missing": None, "null": None, "a text": "text", "a number": -1, "NaN": float("nan"),
    "huge": 10**400, "a list": [], "a mapping": {"a": {}}, "nested": _deep(),
}  # fmt: skip
"""What can stand in a value's place; the first says that it does not stand there."""


def _edited(change: Callable[[dict[str, Any]], None], *, forge: bool) -> Change:
    """Change a manifest; forged, it agrees with itself."""

    def apply(path: Path, _: random.Random) -> None:
        value = json.loads(path.read_text())
        change(value)
        if forge:
            value.pop("checksum", None)
            if isinstance(value.get("ingredients"), dict) and "identity" in value:
                value["identity"] = digest(value["ingredients"])
            value["checksum"] = digest(value)
        fresh(path, json.dumps(value, indent=2).encode())

    return apply


def _set(*path: str, to: str) -> Callable[[Any], None]:
    """Return what puts a wrong value at a place of a JSON value."""

    def change(value: Any) -> None:
        *above, last = path
        for key in above:
            value = value[key]
        if to == "missing":
            value.pop(last, None)
        else:
            value[last] = WRONG[to]

    return change


def _other_payload(key: Sequence[str], to: str) -> Change:
    """Change a value of a JSON file, and let the manifest say that it was written so."""

    def apply(path: Path, _: random.Random) -> None:
        value = json.loads(path.read_text())
        _set(*key, to=to)(value)
        fresh(path, json.dumps(value).encode())
        folder = next(p for p in path.parents if (p / MANIFEST).exists())
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest.pop("checksum", None)
        manifest["files"][str(path.relative_to(folder))] = file_hash(path, cached=False)
        manifest["checksum"] = digest(manifest)
        fresh(folder / MANIFEST, json.dumps(manifest).encode())

    return apply


MANIFEST_VALUES: dict[str, Any] = {
    "of a newer schema": {"schema_version": SCHEMA_VERSION + 1},
    "of a schema without end": {"schema_version": 10**400},
    "of a schema that is a text": {"schema_version": "2"},
    "of the first schema": {"schema_version": 1},
    "of an unknown kind": {"kind": "dream"},
    "of a kind that is a list": {"kind": ["eval"]},
    "of another identity": {"identity": "0" * 64},
    "without an identity": {"identity": ""},
    "of other files": {"files": {}},
    "of files elsewhere": {"files": {"../../../../../../etc/hostname": "0" * 64}},
    "of a time that is none": {"created": "yesterday"},
    "of endless seconds": {"seconds": float("inf")},
    "of costs that are none": {"cost": {"seconds": "many", "cpu_seconds": None, "joules": []}},
    "of parents that are none": {"parents": ["../../..", "", "\0", "saes"]},
    "of ingredients that are none": {"ingredients": {"parents": [], "model": None}},
    "without ingredients": {"ingredients": {}},
    "of a checksum that is none": {"checksum": 1},
}
"""Other values of a manifest."""


def artifact_of(root: Path, kind: type[Kind]) -> Path:
    """Return the folder of the artifact of a kind that is damaged: of the real chain, if it can."""
    artifacts = [a for a in Workspace(root).artifacts(kind) if a.verifiable]
    real = [a for a in artifacts if a.manifest.ingredients["config"]]
    return (real or artifacts)[-1].path


def files_of(folder: Path, kind: type[Kind]) -> list[str]:
    """Return the files that are damaged: those of the kind's schema, and of one layer of SAEs."""
    recorded = json.loads((folder / MANIFEST).read_text())["files"]
    several = [name for name in recorded if "/" in name]
    return [
        name
        for name in recorded
        if name in kind.files or name.startswith(f"{LAYER}/") or (not several and not kind.files)
    ]


THOROUGH = {"saes", "eval"}
"""Kinds that meet every damage; of the others each meets its seeded part, all of them together
most."""


def cases(root: Path) -> list[Case]:
    """Return every case of a workspace that `build` filled, in the order of the kinds' names."""
    folders = {name: artifact_of(root, kind) for name, kind in sorted(KINDS.items())}
    return [case for name in folders for case in _cases_of(root, KINDS[name], folders)]


def _cases_of(root: Path, kind: type[Kind], folders: Mapping[str, Path]) -> Iterator[Case]:
    folder = folders[kind.name]
    draw = random.Random(f"cases of {kind.name}")

    def case(file: str, what: str, change: Change, forged: bool = False) -> Case:
        return Case(kind.name, str(folder.relative_to(root)), file, what, change, forged)

    def some(known: Mapping[str, Any], count: int) -> list[tuple[str, Any]]:
        count = len(known) if kind.name in THOROUGH else min(count, len(known))
        return draw.sample(list(known.items()), count)

    names = files_of(folder, kind)
    for what, change in some(ANY_FILE | JSON_FILE, 6):
        # The checksum is over the values: a space more changes none.
        if what != "has a byte more":
            yield case(MANIFEST, what, change)
    for file in names:
        known = ANY_FILE | (JSON_FILE if file.endswith(".json") else {})
        for what, change in some(known, 8):
            yield case(file, what, change)
    other = draw.choice([name for name in folders if name != kind.name])
    foreign = str((folders[other] / MANIFEST).relative_to(root))
    yield case(MANIFEST, f"is that of {other}", _taken_from(root, foreign))
    for what, changed in some(MANIFEST_VALUES, 3):
        yield case(MANIFEST, f"is {what}", _edited(_updated(changed), forge=False))
    for what, changed in some(MANIFEST_VALUES, 4):
        if not {"checksum", "identity"} & set(changed):
            forged = _edited(_updated(changed), forge=True)
            yield case(MANIFEST, f"is {what}, forged", forged, True)
    for part, schema in (("results", kind.Results), ("config", kind.Settings)):
        for key, item in schema.model_fields.items():
            to = draw.choice(list(WRONG))
            change = _edited(_set(part, item.alias or key, to=to), forge=True)
            yield case(MANIFEST, f"has {to} as {part}.{key}, forged", change, True)
    for file in names:
        if isinstance(kind.files.get(file), type):
            value = json.loads((folder / file).read_text())
            for key in value if isinstance(value, dict) else ():
                to = draw.choice(list(WRONG))
                yield case(file, f"has {to} as {key}, forged", _other_payload([key], to), True)
    yield from _special(case, kind.name)


def _updated(changed: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return lambda value: value.update(changed)


def _taken_from(root: Path, source: str) -> Change:
    def change(path: Path, _: random.Random) -> None:
        place = next(p for p in path.parents if (p / source).exists())
        content = (place / source).read_bytes()
        fresh(path, content)

    return change


def _special(case: Callable[..., Case], kind: str) -> Iterator[Case]:
    """Yield what only one kind has: values that look right and are not."""
    if kind == "saes":
        cfg, weights = f"{LAYER}/cfg.json", f"{LAYER}/sae.safetensors"
        yield case(cfg, "has k 1", _json(lambda v: v.update(k=1)))
        yield case(cfg, "has more latents", _json(lambda v: v.update(num_latents=64)))
        yield case(weights, "has a zeroed encoder", _zero_encoder)
        yield case("", "has two layers exchanged", _exchange_layers)
        yield case("", "lacks a layer", lambda path, _: shutil.rmtree(path / LAYER))
    if kind == "eval":
        yield case("samples.parquet", "has all answers right", _all_right)
        yield case("samples.parquet", "lacks a row", _without_a_row)
        yield case("samples.parquet", "has another column", _other_column)
        yield case("results.json", "has accuracy 1", _json(lambda v: v.update(accuracy=1.0)))
    if kind == "adapter":
        change = _json(lambda v: v.update(lora_alpha=3_000_000))
        yield case("adapter_config.json", "has another alpha", change)
        yield case("adapter_config.json", "has no type", _json(lambda v: v.pop("peft_type")))
    if kind == "recommendation":
        change = _json(lambda v: v.update(recommended=[3]))
        yield case("recommendation.json", "has another layer", change)
    if kind == "counts":
        yield case("features.json", "has other features", _json(_more_features))


def _json(change: Callable[[Any], Any]) -> Change:
    def apply(path: Path, _: random.Random) -> None:
        value = json.loads(path.read_text())
        change(value)
        fresh(path, json.dumps(value).encode())

    return apply


def _more_features(value: Any) -> None:
    for layer in value["layers"]:
        layer["features"] = {rule: list(range(9)) for rule in layer["features"]}


def _zero_encoder(path: Path, _: random.Random) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors["encoder.weight"].zero_()
    path.unlink()
    save_file(tensors, path)


def _exchange_layers(path: Path, _: random.Random) -> None:
    first, second, aside = path / "layers.3.mlp", path / LAYER, path / "aside"
    for source, target in ((first, aside), (second, first), (aside, second)):
        source.rename(target)


def _table(change: Callable[[pa.Table], pa.Table]) -> Change:
    def apply(path: Path, _: random.Random) -> None:
        table = change(pq.read_table(path))
        path.unlink()
        pq.write_table(table, path)

    return apply


def _right(table: pa.Table) -> pa.Table:
    column = table.schema.get_field_index("correct")
    return table.set_column(column, "correct", pa.array([True] * table.num_rows))


_all_right = _table(_right)
_without_a_row = _table(lambda table: table.slice(1))
_other_column = _table(
    lambda table: table.rename_columns([n.replace("correct", "right") for n in table.column_names])
)


# Consumers


@dataclass
class Outcome:
    """What a consumer gave."""

    exit: int
    value: Any = None
    said: str = ""
    """Standard error, or what a page shows."""
    trace: str = ""
    """Of an error that nobody caught."""


def command(arguments: Sequence[str], root: Path) -> Outcome:
    """Run a command in this process, as the command line would."""
    from typer.main import get_command

    from resa_lens.cli import app

    if not _COMMANDS:
        _COMMANDS.append(get_command(app))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = _COMMANDS[0].main([*arguments, "--workspace", str(root)], standalone_mode=False)
        except BaseException:  # noqa: BLE001 - what nobody caught is what is looked for
            return Outcome(1, None, err.getvalue(), traceback.format_exc())
    code = code if isinstance(code, int) else 0
    value: Any = None
    if "--json" in arguments and out.getvalue():
        try:
            value = json.loads(out.getvalue())
        except ValueError:
            return Outcome(1, None, err.getvalue(), f"no JSON: {out.getvalue()[:300]!r}")
    return Outcome(code, value, err.getvalue())


_COMMANDS: list[Any] = []


def _scan(root: Path) -> Outcome:
    """List the workspace as the app does, with sentences, lineage and commands."""
    from resa_lens.artifacts import lineage
    from resa_lens.artifacts.listing import scan

    listing = scan(root)
    rows = [
        [a.relative, a.kind.sentence(a), a.kind.detail(a), a.kind.detail(a, one_based=True)]
        for a in listing.artifacts
    ]
    graph = lineage.build(listing)
    nodes = [[node.key, node.title, node.detail, node.command] for node in graph.nodes]
    problems = "\n".join(listing.problems)
    return Outcome(0, {"rows": rows, "nodes": nodes, "edges": graph.edges}, problems)


def _page(name: str, **query: str) -> Callable[[Path], Outcome]:
    def show(root: Path) -> Outcome:
        from streamlit.testing.v1 import AppTest

        os.environ["RESA_LENS_WORKSPACE"] = str(root)
        app = AppTest.from_function(_script, default_timeout=110, kwargs={"page": name})
        for key, value in query.items():
            app.query_params[key] = value
        with contextlib.redirect_stderr(io.StringIO()):
            app.run()
        trace = "\n".join(str(e.value) + "\n".join(e.stack_trace) for e in app.exception)
        shown = [e.value for part in (app.text, app.markdown, app.caption, app.code) for e in part]
        shown += [e.value for part in (app.error, app.warning, app.info) for e in part]
        tables = [
            json.loads(str(frame.value.drop(columns="MB", errors="ignore").to_json(orient="split")))
            for frame in app.dataframe
        ]
        charts = len(app.get("plotly_chart"))
        value = {"texts": shown, "tables": tables, "charts": charts}
        return Outcome(0, value, "\n".join(map(str, shown)), trace)

    return show


def _script(page: str) -> None:
    from resa_lens.app.explorer import main

    main(page)


@dataclass(frozen=True)
class Consumer:
    """A reader of workspaces."""

    name: str
    run: Callable[[Path], Outcome] = field(repr=False)
    kinds: frozenset[str] | None = None
    """Of the artifacts that it reads; None is all."""
    writes: bool = False
    part: float = 1.0
    """Share of a sample's cases that it gets: what takes long gets few."""


def _command(*arguments: str) -> Callable[[Path], Outcome]:
    return lambda root: command([*arguments, "--json"], root)


def consumers(root: Path) -> list[Consumer]:
    """Return the consumers of a workspace that `build` filled: they name its artifacts."""
    tuned = artifact_of(root, KINDS["adapter"])
    evals = Workspace(root).artifacts(KINDS["eval"])
    evals = [a for a in evals if a.manifest.ingredients["config"]]
    pair = [a.path.name for a in reversed(evals)]
    saes = str(artifact_of(root, KINDS["saes"]).relative_to(root))
    chain = frozenset({"saes", "counts", "recommendation", "adapter", "eval"})

    def with_saes(at: Path) -> Outcome:
        return command(
            ["count-features", *MODEL, "--layers", "3-5", "--saes", str(at / saes), "--json"], at
        )

    def with_adapter(at: Path) -> Outcome:
        folder = str(at / tuned.relative_to(root))
        return command(["eval", *MODEL[2:], "--model", folder, *ASKED, "--json"], at)

    def priced(at: Path) -> Outcome:
        return command(["cost", "--usd-per-hour", "1"], at)

    readers = [
        Consumer("runs", _command("runs")),
        Consumer("runs --verify", _command("runs", "--verify")),
        Consumer("cost", _command("cost")),
        Consumer("cost --adapter", _command("cost", "--adapter", tuned.name)),
        Consumer("compare", _command("compare", *pair), frozenset({"eval"})),
        Consumer("listing", _scan),
        Consumer("runs as a table", lambda at: command(["runs"], at), part=0.1),
        Consumer("cost as a table", priced, part=0.1),
    ]
    feature = _page("features", layer="5", feature="223")
    scored = frozenset({"eval", "sweep", "adapter"})
    placed = scored | {"saes", "counts", "recommendation", "effects", "falsification", "quality"}
    fired = frozenset({"saes", "counts", "activity", "scores", "falsification", "ablation",
                       "attribution"})  # fmt: skip
    pages = [
        Consumer("page overview", _page("overview"), part=0.03),
        Consumer("page layers", _page("layers"), placed, part=0.03),
        Consumer("page features", feature, fired, part=0.03),
        Consumer("page scores", _page("scores"), scored, part=0.03),
    ]
    counted = frozenset({"saes", "counts"})
    writers = [
        Consumer("recommend-layers", _command(*RECOMMEND), counted | {"recommendation"}),
        Consumer("tune", _command(*TUNE), chain),
        Consumer("count-features --saes", with_saes, counted),
        Consumer("eval of the adapter", with_adapter, frozenset({"adapter", "eval"})),
    ]
    return [*readers, *pages, *(replace(one, writes=True, part=0.06) for one in writers)]


# Judgement


VOLATILE = {
    "created", "seconds", "megabytes", "peak_rss_mb", "peak_memory_mb", "cpu_seconds", "joules",
    "fresh", "resumed_at_tokens",
}  # fmt: skip
"""Keys that a repeated command gives another value."""


def settled(value: Any, root: Path) -> Any:
    """Return a consumer's value without what differs between two runs."""
    if isinstance(value, Mapping):
        return {k: settled(v, root) for k, v in value.items() if k not in VOLATILE}
    if isinstance(value, list | tuple):
        return [settled(item, root) for item in value]
    if isinstance(value, str):
        # Sizes are the disk's, not the artifact's.
        return re.sub(r"\d[\d.,]* [KMG]B", "SIZE", value.replace(str(root), "ROOT"))
    return value


@dataclass(frozen=True)
class Verdict:
    """What a consumer made of a case; without faults all is well."""

    case: str
    consumer: str
    outcome: str
    """same, named, refused, other (of a forged one), or a fault."""
    faults: tuple[str, ...] = ()
    peak_mb: float = 0.0
    seconds: float = 0.0


def judge(
    case: Case, consumer: Consumer, outcome: Outcome, plain: Outcome
) -> tuple[str, list[str]]:
    """Say what became of a damaged artifact, and what is wrong with that."""
    if outcome.trace:
        return "traceback", [f"traceback: {outcome.trace.strip().splitlines()[-1][:300]}"]
    said = f"{outcome.said}\n{json.dumps(outcome.value)}"
    names = {case.folder, Path(case.folder).name}
    named = any(name in said.replace("\\n", "\n") for name in _naming_lines(said, names))
    if outcome.exit == 2:
        error = outcome.said[outcome.said.find("error: ") :].strip()
        faults = []
        if len(error.splitlines()) > 3:
            faults.append(f"error of {len(error.splitlines())} lines")
        if not case.forged and not any(name in error for name in names):
            faults.append(f"error that does not name it: {error[:300]!r}")
        return "refused", faults
    verifying = consumer.name == "runs --verify"
    if outcome.exit == 1 and verifying:
        return "named", [] if named else [f"damage that is not named: {outcome.said[-300:]!r}"]
    if outcome.exit != 0:
        return "failed", [f"exit {outcome.exit}: {outcome.said[-300:]!r}"]
    if verifying and not case.forged:
        return "overlooked", ["whole, says --verify"]
    if outcome.value == plain.value:
        return "same", []
    if named:
        return "named", []
    if case.forged:
        return "other", []
    return "used", [f"altered and used without a word: {outcome.said[-300:]!r}"]


def _naming_lines(said: str, names: set[str]) -> set[str]:
    """Return the names that stand in a line that says what is wrong."""
    words = ("left out", "made anew", "damaged", "changed", "missing", "regular file", "cannot be",
             "unknown", "newer", "no manifest", "has no", "no part", "not a manifest", "of kind",
             "another identity", "not verifiable", "has schema", "bytes; at most", "lies where",
             "not an", "not as", "corrupt", "origin")  # fmt: skip
    lines = said.replace("\\n", "\n").replace('", "', "\n").splitlines()
    return {n for n in names for line in lines if n in line and any(w in line for w in words)}


# Processes


def clone(root: Path, target: Path) -> None:
    """Copy a workspace by links: cases never write into a file that is there."""
    shutil.copytree(root, target, copy_function=os.link)


def state(root: Path) -> dict[str, tuple[int, int]]:
    """Return time and size of every path."""
    paths = [
        Path(place) / name for place, folders, files in os.walk(root) for name in folders + files
    ]
    return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in paths}


def in_child(work: Callable[[], Any], timeout: float) -> tuple[Any, float, str]:
    """Do work in a process of its own; return its result, its peak in MB, and what went wrong."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        code = 1
        try:
            with os.fdopen(writing, "w") as stream:
                json.dump(work(), stream, default=str)
            code = 0
        except BaseException:  # noqa: BLE001 - this process ends here, whatever it was
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    parts, wrong, end = [], "", time.monotonic() + timeout
    while True:
        ready, _, _ = select.select([reading], [], [], 0.2)
        if ready:
            block = os.read(reading, 1 << 20)
            if not block:
                break
            parts.append(block)
        elif time.monotonic() > end or resident_mb(pid) > 4096:
            wrong = "hang" if time.monotonic() > end else "memory without end"
            os.kill(pid, signal.SIGKILL)
            break
    os.close(reading)
    _, status, usage = os.wait4(pid, 0)
    if status and not wrong:
        wrong = f"the process ended with status {status}"
    value = json.loads(b"".join(parts)) if parts and not wrong else None
    return value, usage.ru_maxrss / 1024, wrong


def resident_mb(pid: int) -> float:
    """Return a process's resident memory."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * resource.getpagesize() / 2**20


def look(consumers: Sequence[Consumer], root: Path) -> list[dict[str, Any]]:
    """Let consumers read a workspace one after the other; where they only read, nothing changes."""
    looks = []
    for consumer in consumers:
        before = {} if consumer.writes else state(root)
        began = time.process_time()
        outcome = consumer.run(root)
        looks.append(
            vars(outcome)
            | {
                "value": settled(outcome.value, root),
                "written": not consumer.writes and state(root) != before,
                "seconds": time.process_time() - began,
            }
        )
    return looks


def run(
    root: Path,
    plan: Sequence[tuple[Case, Sequence[Consumer]]],
    place: Path,
    *,
    timeout: float = 180.0,
    note: Callable[[Verdict], None] = lambda verdict: None,
) -> list[Verdict]:
    """Give cases to consumers, each in a clone of the workspace and in a process of its own.

    Those that only read share a process; where it hangs or grows, each gets one.
    """
    verdicts: list[Verdict] = []
    plain: dict[str, Outcome] = {}
    target = place / "clone" / root.name
    for case, readers in plan:
        for consumer in readers:
            if consumer.name not in plain:
                plain[consumer.name] = _plain(root, consumer, target, timeout)
        together = [consumer for consumer in readers if not consumer.writes]
        groups = [[consumer] for consumer in readers if consumer.writes]
        groups = [together, *groups] if together else groups
        while groups:
            group = groups.pop(0)
            clone(root, target)
            case.apply(target)
            looks, peak, wrong = in_child(lambda g=group: look(g, target), timeout)
            shutil.rmtree(target.parent)
            if (wrong or peak > LARGEST_MB) and len(group) > 1:
                groups = [[consumer] for consumer in group] + groups
                continue
            for number, consumer in enumerate(group):
                verdict = _verdict(case, consumer, looks and looks[number], plain, peak, wrong)
                verdicts.append(verdict)
                note(verdict)
    return verdicts


LARGEST_MB = 1024.0


def _verdict(
    case: Case,
    consumer: Consumer,
    value: dict[str, Any] | None,
    plain: Mapping[str, Outcome],
    peak: float,
    wrong: str,
) -> Verdict:
    outcome, faults, seconds = wrong, [wrong] if wrong else [], 0.0
    if value is not None:
        written, seconds = value.pop("written"), value.pop("seconds")
        outcome, faults = judge(case, consumer, Outcome(**value), plain[consumer.name])
        faults += ["a reader wrote into the workspace"] if written else []
    if peak > LARGEST_MB:
        faults.append(f"{peak:.0f} MB of memory")
    return Verdict(case.name, consumer.name, outcome, tuple(faults), peak, seconds)


def _plain(root: Path, consumer: Consumer, target: Path, timeout: float) -> Outcome:
    """Return what a consumer gives without damage."""
    clone(root, target)
    looks, _, wrong = in_child(lambda: look([consumer], target), timeout)
    assert not wrong, f"{consumer.name} on the whole workspace: {wrong}"
    shutil.rmtree(target.parent)
    ((value),) = looks
    assert not value.pop("written"), f"{consumer.name} writes"
    value.pop("seconds")
    outcome = Outcome(**value)
    assert outcome.exit == 0, f"{consumer.name} on the whole workspace: {outcome}"
    assert not outcome.trace, f"{consumer.name} on the whole workspace: {outcome}"
    return outcome


def plan_of(root: Path, seed: int = 0, share: float = 1.0) -> list[tuple[Case, list[Consumer]]]:
    """Return the cases with their consumers, all of them or a seeded share."""
    readers, draw = consumers(root), random.Random(seed)
    known = cases(root)
    if share < 1:
        known = draw.sample(known, round(share * len(known)))
    return [
        (
            case,
            [
                consumer
                for consumer in readers
                if (consumer.kinds is None or case.kind in consumer.kinds)
                and (share == 1 or draw.random() < consumer.part)
            ],
        )
        for case in known
    ]


def warm() -> None:
    """Import what the consumers need, before processes are forked: each would do it again."""
    import peft  # noqa: F401
    import streamlit.testing.v1
    import torch
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    import resa_lens.app.explorer
    import resa_lens.stages.demo
    import resa_lens.stages.sweep  # noqa: F401

    torch.set_num_threads(1)
    import streamlit.logger

    streamlit.logger.set_log_level("ERROR")
    with tempfile.TemporaryDirectory() as place:
        command(["runs", "--json"], Path(place) / "nothing")
        _page("layers")(Path(place) / "nothing")
    # What the collector never touches stays shared with the children.
    gc.collect()
    gc.freeze()
