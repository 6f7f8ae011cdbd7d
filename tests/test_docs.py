"""The documents: every command in them is run, parsed, or listed with why not; links; figures.

A document's shell blocks are given to bash itself, with every program replaced by one that only
writes down its words: variables, loops and quotes mean here what they mean to a reader.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from document_reader import Reader, reading
from markdown_it import MarkdownIt
from markdown_it.token import Token
from small_hub import fill_hub
from typer.main import get_command

from resa_lens.cli import app

ROOT = Path(__file__).resolve().parents[1]


def _reference() -> Any:
    """docs/make_reference.py as a module."""
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs/make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules["make_reference"] = made
    spec.loader.exec_module(made)
    return made


REFERENCE = _reference()
GENERATED = {f"docs/{name}": text for name, text in REFERENCE.pages().items()}
"""Pages that lie nowhere: the site makes them from the code."""
WRITTEN = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")),
)
DOCUMENTS = (*WRITTEN, "docs/commands.md")


def text_of(document: str) -> str:
    return GENERATED.get(document) or (ROOT / document).read_text()


COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]

PROGRAMS = ("pip", "ruff", "pyright", "mkdocs", "source", "streamlit", "git")
RECORDED = {
    "docs/findings.md": "long experiments, made once; their commands are only parsed",
    "docs/experiment-experts.md": "a registered run, made once; its commands are only parsed",
    "docs/log.md": "measurements, made once; their commands are only parsed",
}
NOT_RUN: dict[str, str] = {
    r"python3 -m venv .*|(.*/)?pip install .*|source .*": "CI installs, as the README says",
    r"(\.venv/bin/)?python -m pytest.*|\.venv/bin/(ruff|pyright) .*|\.ci/run": "CI runs this",
    r"(\.venv/bin/)?mkdocs .*": "the site: built by a test of the slow tier and by CI",
    r"hf .*|python -c import datasets.*": "needs a network; its options are checked",
    r"\.venv-vllm/bin/resa-lens .*": "vllm has an environment of its own; parsed (recorded tests)",
    r"(resa-lens|streamlit run) app.*": "serves until stopped; the browser tests walk it",
    r"resa-lens (sweep|falsify) .*--(join|ray).*": "several workers: tests/jobs and tests/stages",
    r"python -m benchmarks\.many_jobs .*": "a minute; its figures stand in docs/log.md",
    r"resa-lens demo$": "the demo fixture runs it; the full budget stands in docs/log.md",
}
"""Commands that the slow test leaves out, by their beginning, with the reason."""

SHORTER: dict[str, dict[str, str]] = {
    r"resa-lens eval --model tiny-reasoner": {"--limit": "16"},
    r"resa-lens train-saes .*--tokens (200000|5900000)$": {"--tokens": "4096"},
    r"resa-lens tune .*own-samples": {"--steps": "2", "--limit": "16", "--data": "few.jsonl"},
    r"resa-lens tune .*--preset reference": {"--steps": "2", "--tokens": "4096"},
    r"resa-lens tune": {"--steps": "2", "--limit": "16"},
    r"resa-lens sweep .*--layers all": {
        "--layers": "5", "--seeds": "1", "--steps": "2", "--limit": "8",
    },
    r"resa-lens sweep .*--steps 2000": {"--steps": "2", "--seeds": "1"},
    r"resa-lens ablate": {"--limit": "2"},
    r"resa-lens experts steer": {
        "--limit": "2", "--text-tokens": "5000", "--answer-sets": "1", "--draws": "199",
    },
    r"resa-lens experts": {"--text-tokens": "8000"},
    r"resa-lens (activity|match-features|score-features)": {"--text-tokens": "2048"},
    r"resa-lens attribute": {"--text-tokens": "256"},
}  # fmt: skip
"""Options that the slow test gives another value, or adds, so that a command ends in seconds; of
the patterns that match a command the first counts.  Everything else runs as it stands."""


# Commands, as bash reads them


@cache
def tokens(document: str) -> tuple[Token, ...]:
    return tuple(MarkdownIt().enable("table").parse(text_of(document)))


def inline(document: str) -> Iterator[Token]:
    for token in tokens(document):
        yield from token.children or ()


def script(document: str) -> str:
    """All shell of a document: blocks marked bash, and indented ones.

    What may be left out stands in brackets; here it is there.
    """
    text = "\n".join(
        token.content
        for token in tokens(document)
        if token.type == "code_block" or (token.type == "fence" and token.info == "bash")
    )
    return re.sub(r"\[(--[^\]]+)\]", r"\1", text)


@cache
def commands(document: str) -> tuple[tuple[str, ...], ...]:
    """The commands of a document in their order, each as its words."""
    text = script(document)
    named = {word for word in re.findall(r"[\w.-]*/[\w./-]+", text) if ":" not in word}
    functions = "\n".join(f'function {name} {{ note {name} "$@"; }}' for name in sorted(named))
    prelude = r"""
        set -u; PATH=/nowhere; notes=$PWD/notes; : >"$notes"
        note() { printf '%s\0' "$@" $'\x1e' >>"$notes"; }
        command_not_found_handle() { note "$@"; }
        function source { note source "$@"; }
        """
    with TemporaryDirectory() as empty:
        done = subprocess.run(
            ["/bin/bash", "-c", prelude + functions + "\n" + text],
            capture_output=True, text=True, cwd=empty, check=False,
        )  # fmt: skip
        words = (Path(empty) / "notes").read_text()
    assert done.returncode == 0, f"{document}: {done.stderr}"
    assert not done.stderr, f"{document}: {done.stderr}"
    found = [tuple(part.strip("\0").split("\0")) for part in words.split("\x1e\0")]
    return tuple(command for command in found if command != ("",))


def first(table: dict[str, Any], command: tuple[str, ...]) -> Any:
    line = " ".join(command)
    return next((value for key, value in table.items() if re.match(key, line)), None)


def arguments(command: tuple[str, ...]) -> list[str] | None:
    """The words behind resa-lens, however it is started; None for another program."""
    if Path(command[0]).name == "resa-lens":
        return list(command[1:])
    if "-m" in command and "resa_lens" in command:
        return list(command[command.index("resa_lens") + 1 :])
    return None


def parse(words: list[str]) -> None:
    """Parse a command line of ours without running it."""
    assert words, "resa-lens without a command"
    assert words[0] in COMMANDS, f"no command {words[0]!r}"
    COMMANDS[words[0]].make_context(words[0], words[1:])


@cache
def options_of_hf() -> str:
    hf = Path(sys.executable).with_name("hf")
    return subprocess.run(
        [str(hf), "download", "--help"], capture_output=True, text=True, check=True
    ).stdout


def check_other(command: tuple[str, ...]) -> None:
    """Check what can be checked of another program without running it."""
    program = Path(command[0]).name
    if program.startswith("python"):
        if "-c" in command:
            compile(command[command.index("-c") + 1], "document", "exec")
        elif "-m" in command:
            assert importlib.util.find_spec(command[command.index("-m") + 1].split(".")[0])
        else:
            assert (ROOT / command[1]).is_file(), command
    elif program == "hf":
        assert command[1] == "download"
        for option in (word for word in command if word.startswith("--")):
            assert option in options_of_hf(), command
    elif program in ("run", "install_engine.sh"):
        assert (ROOT / command[0]).is_file(), command
    elif program == "bash":
        assert (ROOT / command[1]).is_file(), command
    else:
        assert program in ("pip", "ruff", "pyright", "mkdocs", "source", "streamlit", "git"), (
            command
        )


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_parses(document: str) -> None:
    for command in commands(document):
        words = arguments(command)
        if words is None:
            check_other(command)
        else:
            parse(words)


def test_the_shell_reader_sees_what_bash_sees() -> None:
    """Variables, continued lines, loops and both ways to mark a block are in findings.md."""
    found = commands("docs/findings.md")
    assert [c[-1] for c in found if "own-samples" in c] == ["0", "1", "2"]
    sweep = next(c for c in found if c[:2] == ("resa-lens", "sweep"))
    assert sweep[sweep.index("--rule") :][:2] == ("--rule", "either")
    code = next(c[2] for c in found if c[:2] == ("python", "-c"))
    assert "scores.csv" in code
    assert "\\\n" not in code
    with pytest.raises(Exception, match="No such option"):
        parse(["tune", "--no-such-option"])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_the_text_exist(document: str) -> None:
    for token in inline(document):
        words = token.content.split() if token.type == "code_inline" else []
        if len(words) < 2 or words[0] != "resa-lens" or words[1].startswith("-"):
            continue
        assert words[1] in COMMANDS, token.content
        known = {o for p in COMMANDS[words[1]].params for o in (*p.opts, *p.secondary_opts)}
        used = {word for word in words if word.startswith("--")}
        assert used <= {*known, "--help"}, token.content


# Links and paths


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(document: str) -> set[str]:
    rows = tokens(document)
    return {slug(after.content) for token, after in pairwise(rows) if token.type == "heading_open"}


@pytest.mark.parametrize("document", WRITTEN)
def test_every_link_and_image_exists(document: str) -> None:
    for token in inline(document):
        target = str(token.attrs.get("href") or token.attrs.get("src") or "")
        if not target or re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        file = (ROOT / document).parent / place if place else ROOT / document
        assert file.exists(), f"{document}: {target}"
        if anchor:
            assert anchor in anchors(str(file.resolve().relative_to(ROOT))), target
        if token.type == "image":
            assert token.content, f"{document}: {target} has no text"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_document_holds_a_machines_path(document: str) -> None:
    text = text_of(document)
    assert not re.findall(r"(?<![\w.~*])/(?:work|home|root|tmp|mnt|opt|srv|Users)/\S*", text)


def test_the_index_names_every_document() -> None:
    named = {
        ((ROOT / "docs" / str(t.attrs["href"])).resolve().relative_to(ROOT)).as_posix()
        for t in inline("docs/index.md")
        if t.type == "link_open"
    }
    assert named == set(WRITTEN) - {"README.md", "docs/index.md"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document: str) -> None:
    spoken = [token.content for token in inline(document) if token.type == "code_inline"]
    words = {word for text in spoken for word in text.split()}
    words |= {word for command in commands(document) for word in command}
    for word in words:
        if re.fullmatch(r"(data|docs|apps|benchmarks|notebooks|tests)/[a-z0-9_./-]+", word):
            assert (ROOT / word).exists(), word


# Made from the code, or held to it


def test_the_reference_leaves_nothing_out() -> None:
    directives = re.findall(r"^::: resa_lens\.(\S+)", "\n".join(GENERATED.values()), re.MULTILINE)
    assert len(set(directives)) == len(directives), "one page for each name"
    front = {f"session.{file.stem}" for file in (ROOT / "resa_lens/session").glob("[a-z]*.py")}
    assert set(directives) == {*REFERENCE.all_modules(), *front}
    sections = re.findall(r"^### resa-lens (\S+)", GENERATED["docs/commands.md"], re.MULTILINE)
    assert set(sections) == set(COMMANDS)


def test_the_reference_is_written_into_a_folder(tmp_path: Path) -> None:
    assert REFERENCE.main([str(tmp_path)]) == 0
    files = {f"docs/{p.relative_to(tmp_path)}" for p in tmp_path.rglob("*.md")}
    assert files == set(GENERATED)
    assert REFERENCE.main([]) == REFERENCE.main(["--check"]) == 2


def public(tree: ast.AST, name: str) -> Iterator[tuple[str, str | None]]:
    """(name, docstring) of a module's public functions and classes, and of their methods."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield f"{name}.{node.name}", ast.get_docstring(node)
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{name}.{node.name}")


def test_every_public_name_has_a_docstring_that_ends() -> None:
    bad = []
    for file in sorted((ROOT / "resa_lens").rglob("*.py")):
        where = str(file.relative_to(ROOT / "resa_lens"))
        if where.startswith("_data"):
            continue
        for name, told in public(ast.parse(file.read_text()), where):
            first = (told or "").partition("\n\n")[0].strip()
            if first[-1:] not in (".", "?", ":"):
                bad.append(name)
    assert bad == []


def test_the_glossary_has_each_term_once_in_order_of_its_sections() -> None:
    text = text_of("docs/glossary.md")
    entries = re.findall(r"^\*\*([^*]+)\*\*", text, re.MULTILINE)
    terms = [term.strip().lower() for entry in entries for term in entry.split(",")]
    assert len(set(terms)) == len(terms)
    known = {
        "hook point", "site", "sae", "latent", "w_enc", "d_in", "k", "fvu", "l0", "rule",
        "exclusive feature", "mixture", "verdict", "selector", "recommendation", "control",
        "artifact", "identity", "recipe",
    }  # fmt: skip
    assert known <= set(terms)
    # Italics refer to an entry.
    for reference in re.findall(r"(?<!\*)\*([^*\n]+)\*(?!\*)", text):
        assert any(term.startswith(reference.lower().rstrip("s")) for term in terms), reference


def test_the_glossary_names_what_the_code_has() -> None:
    import resa_lens.artifacts.kinds.counts  # noqa: F401 - the kinds are listed as they are loaded
    from resa_lens.artifacts.artifact import KINDS
    from resa_lens.features.exclusive import RULES
    from resa_lens.features.words import VERDICTS
    from resa_lens.layers import FLAT, SUPPORTED, TREND, WEAK
    from resa_lens.layers.selectors import SELECTORS
    from resa_lens.models.hookpoints import SITES
    from resa_lens.texts.prompts import PHASES

    text = text_of("docs/glossary.md")
    for name in (*SITES, *RULES, *SELECTORS, *VERDICTS, *PHASES, FLAT, SUPPORTED, TREND, WEAK):
        assert f"`{name}`" in text, name
    assert "counts" in KINDS


# The site


@pytest.mark.recorded  # CI builds it by its own command
def test_the_site_builds_strictly_without_a_network(tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install -c constraints.txt -e '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for page in ("index.html", "tutorial/index.html", "glossary/index.html", "commands/index.html"):
        assert (tmp_path / page).is_file()
    text = (tmp_path / "api/index.html").read_text()
    for name in (
        "scoring.Scoring.tune",
        "lab.Lab.recommend",
        "lab.open_lab",
        "plain.load_sae",
        "scores.Tuned.table",
    ):
        assert f'id="resa_lens.session.{name}"' in text
    # Nothing is fetched by a reader's browser but links that a person follows.
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?:', text)


def table_under(heading: str) -> list[list[str]]:
    """Rows of the first table under a heading of formats.md, as cells."""
    text = (ROOT / "docs/formats.md").read_text().split(f"# {heading}\n", 1)[1]
    rows = []
    for line in text.splitlines():
        if line.startswith("|"):
            rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
        elif rows:
            break
    return rows[2:]


def test_tables_of_columns_agree_with_the_code() -> None:
    from resa_lens.artifacts import feature_tables as feature_files
    from resa_lens.artifacts.kinds.matches import MATCH_SCHEMA
    from resa_lens.evals.run import SAMPLE_SCHEMA

    for file, schema in (
        ("features.parquet", feature_files.FEATURE_SCHEMA),
        ("examples.parquet", feature_files.EXAMPLE_SCHEMA),
        ("documents.parquet", feature_files.DOCUMENT_SCHEMA),
        ("scores.parquet", feature_files.SCORE_SCHEMA),
        ("matches.parquet", MATCH_SCHEMA),
        ("samples.parquet", SAMPLE_SCHEMA),
    ):
        told = [(row[0], row[1]) for row in table_under(file)]
        columns = [(field.name, str(field.type)) for field in schema]
        assert told == [(n, re.sub(r"list<\w+: (\w+)>", r"list<\1>", t)) for n, t in columns], file


def test_the_manifests_fields_agree_with_the_code() -> None:
    from resa_lens.artifacts.artifact import KINDS
    from resa_lens.artifacts.manifest import SCHEMA_VERSION, Manifest
    from resa_lens.artifacts.workspace import Workspace  # noqa: F401 - knows the kinds

    rows = table_under("manifest.json")
    assert [row[0] for row in rows] == list(Manifest.model_fields)
    for name, kind, *_ in rows:
        annotation = str(Manifest.model_fields[name].annotation)
        assert kind.split(" or ")[0] in annotation, (name, annotation)
        assert ("null" in kind) == ("None" in annotation), name
    assert rows[0][2].startswith(f"{SCHEMA_VERSION} today")
    assert [row[0] for row in table_under("The workspace")] == list(KINDS)


@pytest.mark.parametrize("which", ["shipped", "demo"])
def test_every_file_of_a_workspace_is_told(which: str, request: pytest.FixtureRequest) -> None:
    place = ROOT / "data" / "workspace"
    if which == "demo":
        place = request.getfixturevalue("demo").workspace
    told = (ROOT / "docs/formats.md").read_text()
    folders = {row[0]: row[1].split("/")[0] for row in table_under("The workspace")}
    kinds = set()
    for file in place.rglob("*"):
        # The arms of an ablation carry the control's number and the dose.
        name = re.sub(r"^(control)-\d+-[\d.]+(?=\.parquet)", r"\1-0-1", file.name)
        name = re.sub(r"^(target)-[\d.]+(?=\.parquet)", r"\1-1", name)
        if file.is_file() and file.parent != place:
            assert f"`{name}`" in told, file
        if file.name == "manifest.json":
            kind = json.loads(file.read_text())["kind"]
            assert file.relative_to(place).parts[0] == folders[kind]
            kinds.add(kind)
    assert {"saes", "counts", "recommendation", "adapter", "eval"} <= kinds


def test_figures_of_the_guide_follow_from_the_shapes() -> None:
    """Numbers that docs/how-to-r1-distill.md calls shapes or estimates, computed again."""
    from resa_lens.evals.benchmarks import BENCHMARKS
    from resa_lens.saes.plan import state_mb
    from resa_lens.saes.train import SaeConfig
    from resa_lens.tuning.loop import TuneConfig

    wide = SaeConfig().for_width(1536)
    latents, trained = wide.latents or 0, wide.tokens or 0
    layers, width, inner, keys, words = 28, 1536, 8960, 256, 151_936
    block = 2 * width * (width + keys) + 3 * width * inner
    rate = 1e14
    encoder = 2 * width * latents
    passes = 2 * 27 * block
    training = trained * (passes + 26 * encoder) / rate
    rank = TuneConfig().rank
    lora = layers * rank * (2 * 2 * width + 2 * (width + keys))
    # Two passes that share nothing, and the way back of each to its activations.
    per_token = 2 * 2 * 2 * (layers * block + words * width)
    questions = sum(benchmark.questions for benchmark in BENCHMARKS.values())
    cached = layers * 2 * keys * 2
    weights = 2 * (layers * block + 2 * words * width)
    text = " ".join((ROOT / "docs/how-to-r1-distill.md").read_text().split())
    for figure in (
        f"{weights / 1e9:.2f} GB (*shapes*: {weights / 2e6:,.0f} M parameters",
        f"two encoders of {encoder * 2 / 1e6:.0f} MB",
        f"{(2 * encoder * 2 + weights) / 1e9:.1f} GB (*shapes*",
        f"28 layers {28 * 0.806:.1f} GB",
        f"{state_mb(wide, width):,.0f} MB, so 26 layers take {26 * state_mb(wide, width):,.0f} MB",
        f"{26 * 2 * latents * width * 4 / 2**20:,.0f} MB, and "
        f"{2 * 26 * state_mb(wide, width):,.0f} MB while it runs",
        f"{block / 1e6:.1f} M parameters) and {26 * encoder / 1e9:.2f} GFLOP",
        f"a token costs {passes / 1e9:.2f} GFLOP",
        f"that is {training * rate:.1e}".replace("e+", "e"),
        f"{training / 60:.0f} minutes at R",
        f"which makes {1.76 * training / 60:.0f}",
        f"{1.76 * training / 60:.0f} min (*estimate*)",
        f"while it runs (*plan*) | {1.76 * training / 3600:.2f} |",
        f"{(2 * 13 * block + encoder) / 1e9:.2f} GFLOP a token, two more runs of "
        f"{1.76 * trained * (2 * 13 * block + encoder) / rate / 60:.1f} minutes",
        f"{per_token / 1e9:.2f} GFLOP a token. Two epochs of {trained / 1e6:.1f} M tokens are "
        f"{2 * trained * per_token:.2e}, {2 * trained * per_token / rate / 60:.0f} minutes at "
        "R".replace("e+", "e"),
        f"adapters with their optimizer {lora / 1e6:.1f} M x 16 bytes",
        f"{(weights + 2 * latents * width * 4 + 16 * lora) / 1e9:.1f} GB and activations",
        f"{lora * 4 / 1e6:.0f} MB | {2 * trained * per_token / rate / 3600:.2f} |",
        f"{questions:,} questions x 32,768 tokens are {questions * 32_768 / 1e6:.1f} M tokens",
        f"{cached:,} bytes a token",
        f"{cached * 32_768 / 1e9:.2f} GB, so 16 at a time need {16 * cached * 32_768 / 1e9:.0f} GB",
        f"{2000 * 256 / 1e6:.2f} M tokens, {2000 * 256 * per_token / rate:.0f} s at R",
    ):
        assert figure in text, figure


def test_the_citation_is_valid() -> None:
    told = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert told["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(told)
    from resa_lens import __version__

    assert str(told["version"]) == __version__
    (paper,) = told["references"]
    assert {"type", "title", "authors"} <= set(paper)
    assert all({"family-names", "given-names"} == set(author) for author in paper["authors"])
    assert __version__ in (ROOT / "CHANGELOG.md").read_text()


# Run


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    with reading(tmp_path) as one:
        yield one
    shutil.rmtree(tmp_path / "resa-workspace", ignore_errors=True)


def follow(reader: Reader, document: str) -> list[str]:
    """Run a document's commands in their order; return them as they were run."""
    lines = []
    for command in commands(document):
        if first(NOT_RUN, command):
            continue
        words = arguments(command)
        assert words is not None, f"{command} is neither run nor listed"
        for option, value in (first(SHORTER, command) or {}).items():
            if option in words:
                words[words.index(option) + 1] = value
            else:
                words += [option, value]
        began = time.perf_counter()
        reader.run(words)
        lines.append(" ".join(words))
        print(f"{time.perf_counter() - began:5.1f} s  {lines[-1]}")
    return lines


def follow_python(reader: Reader) -> None:
    """The tutorial's Python finds what its commands left: no artifact is new."""
    (code,) = (t.content for t in tokens("docs/tutorial.md") if t.info == "python session")
    for whole, less in (
        ("tokens=200_000", "tokens=4096"),
        ("learning_rate=1e-4", "learning_rate=1e-4, steps=2, limit=16"),
    ):
        assert whole in code
        code = code.replace(whole, less)
    before = set(reader.workspace.rglob("manifest.json"))
    env = {k: v for k, v in os.environ.items() if k != "RESA_LENS_WORKSPACE"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=reader.folder, env=env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "SAE, layer" in done.stdout
    assert set(reader.workspace.rglob("manifest.json")) == before


@pytest.mark.recorded
def test_the_tutorial_and_the_examples_of_the_commands_run(reader: Reader) -> None:
    """The examples follow in the tutorial's workspace, as with a reader who tries them after it."""
    assert len(follow(reader, "docs/tutorial.md")) >= 12
    follow_python(reader)
    assert len(follow(reader, "docs/commands.md")) >= 20
    kinds = {row["kind"] for row in json.loads(reader.run(["runs", "--json"]))["runs"]}
    assert {"eval", "saes", "adapter"} <= {kind.partition(",")[0] for kind in kinds}, kinds


@pytest.mark.recorded
def test_the_guide_for_r1_distill_runs_on_a_small_hub(reader: Reader) -> None:
    fill_hub(reader.folder / "huggingface")
    done = follow(reader, "docs/how-to-r1-distill.md")
    assert sum("eval" in line and "aime24" in line for line in done) == 2


def session_of_the_readme() -> str:
    (code,) = (t.content for t in tokens("README.md") if t.info == "python session")
    return code


def test_the_readmes_session_is_ten_lines_and_one_import() -> None:
    lines = [line for line in session_of_the_readme().splitlines() if line.strip()]
    assert len(lines) == 10
    assert sum(line.startswith(("import ", "from ")) for line in lines) == 1


@pytest.mark.slow
def test_the_readmes_session_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With less data and fewer steps; the output that the README shows has the same parts."""
    monkeypatch.chdir(tmp_path)
    code = session_of_the_readme()
    for whole, less in (
        ('layers="1-10"', 'layers="1-10", latents=256, tokens=4096'),
        ("learning_rate=1e-4", "learning_rate=1e-4, steps=2, limit=16"),
    ):
        assert whole in code
        code = code.replace(whole, less)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = next(t.content for t in tokens("README.md") if t.info == "text session")
    for part in (
        "Exclusive features of tiny-reasoner",
        "Tune layer",
        "Verdict:",
        "answers changed",
    ):
        assert part in shown
        assert part in done.stdout
    assert (tmp_path / "runs" / "adapters").is_dir()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_in_the_documents_runs(document: str) -> None:
    for token in tokens(document):
        if token.type == "fence" and token.info == "python":
            exec(compile(token.content, document, "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_other_documents_hold_only_what_is_run_or_listed(reader: Reader, document: str) -> None:
    follow(reader, document)
