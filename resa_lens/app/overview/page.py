"""The page "Overview": the answers first, then what the workspace holds, and what it lacks."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import streamlit as st

from resa_lens.app import data, empty, links
from resa_lens.app.overview import answers
from resa_lens.app.widgets import apart, figure, missing, plain, problem, problems, shell, table
from resa_lens.artifacts import commands, lineage
from resa_lens.artifacts.artifact import COLUMNS, Artifact
from resa_lens.artifacts.checklist import DONE, UNFINISHED, Step, checklist
from resa_lens.artifacts.commands import Model
from resa_lens.artifacts.kinds.activity import Activity
from resa_lens.artifacts.kinds.counts import Counts
from resa_lens.artifacts.kinds.eval import Eval, is_adapted
from resa_lens.artifacts.kinds.model import MergedModel
from resa_lens.artifacts.kinds.recommendation import Recommendation
from resa_lens.artifacts.kinds.sweep import Sweep
from resa_lens.artifacts.lineage import Graph, Node
from resa_lens.artifacts.listing import UNVERIFIABLE, Listing, name_of
from resa_lens.artifacts.manifest import flat
from resa_lens.machine.meters import watt_hours

_PAGES = {
    links.LAYERS: ("saes", "counts", "quality", "recommendation", "effects", "stability", "sweep"),
    links.FEATURES: (
        "activity", "scores", "falsification", "ablation", "attribution", "matches"
    ),
    links.SCORES: ("adapter", "eval"),
    links.LAB: ("model",),
}  # fmt: skip
"""The kinds that each page shows."""
# The graph keeps its width on a phone and scrolls inside its own box.
_SCROLL = (
    "<style>.st-key-lineage-box{overflow-x:auto}.st-key-lineage-box>div{min-width:820px}</style>"
)


def show(listing: Listing) -> None:
    """Draw the page."""
    models = commands.models(listing)
    if not models:
        _problems(listing)
        empty.nothing(listing)
        return
    model = _model(listing, models)
    answers.show(listing, model)
    _problems(listing)
    apart(
        partial(_lineage, listing),
        partial(_checklist, listing, model),
        partial(_runs, listing),
    )


# Bad workspaces


def _problems(listing: Listing) -> None:
    problems(listing.problems)
    if not listing.whole:
        problem(
            f"{listing.root} holds more files and folders than a workspace does; only a part was "
            "looked at. If it is no workspace, open one by its own path:",
            "resa-lens app --workspace resa-workspace",
        )


# The answers


def _model(listing: Listing, models: list[Model]) -> Model:
    """Choose the model that the page is about."""
    # Not those that were only scored, or drawn at random as a control.
    weights = {a.weights for a in listing.artifacts if a.kind is not Eval}
    main = [m for m in models if not m.drawn and m.weights in weights] or models
    if len(main) == 1:
        return main[0]
    by_slug = {model.slug: model for model in main}
    return by_slug[str(st.selectbox("Model", list(by_slug), **links.bound("about")))]


# The graph


def _lineage(listing: Listing) -> None:
    from resa_lens.figures.lineage import lineage_figure

    st.subheader("How each result was made", anchor=False)
    st.caption(
        "A square is an artifact; lines lead from what it was made from. A pile stands for several "
        "alike ones, a hollow square for one that is not in this workspace. Click a square, or "
        "choose below."
    )
    graph = lineage.build(listing, one_based=links.one_based())
    folded = [a.relative for n in graph.nodes if len(n.members) > 1 for a in n.members]
    folded += [absent.key for node in graph.nodes for absent in node.absent]
    # Before the choice below exists, as on a link's first run, only the address holds it.
    key = st.session_state.get("artifact") or st.query_params.get("artifact")
    node = graph.node(str(key)) if key else None
    st.html(_SCROLL)
    with st.container(key="lineage-box"):
        figure(
            lineage_figure(
                graph.nodes, graph.edges, headings=COLUMNS, chosen=node.key if node else None
            ),
            "lineage",
            select=_clicked,
            alt=f"Lineage of {len(graph.nodes)} artifacts; the choice below says the same in words",
        )
    names = _names(listing, graph, folded)
    choice = links.choice(st, "Artifact", "artifact", names, optional="Choose an artifact")
    if choice and (node := graph.node(choice)):
        with st.container(border=True):
            _node(listing, graph, node, str(choice))


def _names(listing: Listing, graph: Graph, folded: Sequence[str]) -> dict[str, str]:
    """Return what the choice says of each node, and of what is folded into them, by key."""
    names = {}
    for key in [*(node.key for node in graph.nodes), *folded]:
        artifact, node = listing.at(key), graph.node(key)
        if artifact:
            title = artifact.kind.title
            names[key] = f"{title}: {name_of(artifact, one_based=links.one_based())}"
        elif node:
            known = node.key == key and not node.missing
            names[key] = f"{node.title}, {node.detail}" if known else f"missing: {key}"
    return names


def _clicked() -> None:
    """Choose the node that was clicked, before the page runs again."""
    for point in st.session_state["lineage"]["selection"]["points"][:1]:
        key = point["customdata"]
        links.choose("artifact", key[0] if isinstance(key, list | tuple) else key)


def _node(listing: Listing, graph: Graph, node: Node, key: str) -> None:
    """Everything of a node, or of one artifact that is folded into it."""
    artifact = listing.at(key)
    if artifact:
        _artifact(artifact)
    elif node.missing:
        st.text(f"{node.title} that something here was made from; not in this workspace.")
        for absent in [n for n in node.absent if n.key == key] or node.absent or (node,):
            if absent.command:
                missing(f"This command makes {absent.key}:", absent.command)
            else:
                st.text(f"It lies elsewhere: {absent.key}")
    elif node.members:
        st.text(f"{node.title} with the same parents; choose one above.")
        table([_row(member) for member in node.members], "folded")
    else:
        model = next((m for m in commands.models(listing) if node.key == f"model {m.slug}"), None)
        count = len([a for a in listing.artifacts if model and a.weights == model.weights])
        st.text(f"The model {node.title}, {node.detail}; {count} artifact(s) were made of it.")
    for page, kinds in _PAGES.items():
        if node.kind.name in kinds and not node.missing:
            address = _address(listing, artifact, page) if artifact else {}
            links.to(
                page, f"Open in {links.PAGES[page][0]}", icon=":material/open_in_new:", **address
            )
    _related("Made from", graph.parents(node))
    _related("Made of it", graph.children(node))


def _address(listing: Listing, artifact: Artifact, page: str) -> dict[str, str]:
    """Return what the page that shows an artifact is to have chosen."""
    kind, path = artifact.kind, artifact.relative
    if kind is Activity:
        return {"run": path}
    if kind is Eval:
        return {"right" if is_adapted(artifact) else "left": path}
    if page == links.FEATURES:
        return data.features_of(listing, data.saes_path(artifact))
    if page != links.LAYERS:
        return {}
    address = {kind.name: path} if kind in (Counts, Recommendation, Sweep) else {}
    if kind is Recommendation and (counts := listing.parent(artifact, Counts)):
        address["counts"] = counts.relative
    model = commands.model_of(artifact, commands.models(listing))
    return {"model": model.slug if model else "", **address}


def _artifact(artifact: Artifact) -> None:
    st.text(artifact.kind.sentence(artifact))
    if not artifact.verifiable:
        st.badge(UNVERIFIABLE, icon=":material/help:", color="gray")
    shell(shlex.join(artifact.manifest.command))
    for text in getattr(artifact.results, "warnings", ()):
        st.badge("warning", icon=":material/warning:", color="orange")
        st.text(text)
    name = artifact.path.name
    table(_manifest(artifact, megabytes(artifact)), f"manifest_{name}")
    table(_settings(artifact), f"configuration_{name}", "Configuration")


def _manifest(artifact: Artifact, megabytes: float) -> list[dict[str, str]]:
    """Return an artifact's manifest, without its command, configuration and results."""
    manifest, cost = artifact.manifest, artifact.manifest.cost
    lines = [
        ("folder", str(artifact.path)),
        ("identity", manifest.identity or UNVERIFIABLE),
        ("made", f"{manifest.created.replace('T', ' ')[:19]} UTC"),
        ("took", f"{manifest.seconds:,.1f} s"),
        ("size", f"{megabytes:,.2f} MB"),
        ("peak memory", f"{manifest.peak_memory_mb:,.0f} MB"),
        *_cost(cost),
        ("seed", str(manifest.seed)),
        ("device", f"{manifest.device}, {manifest.dtype}, {manifest.threads} thread(s)"),
        ("kernels", manifest.kernel_path),
        ("machine", str(cost.get("hardware") or manifest.platform)),
        ("versions", ", ".join(f"{name} {text}" for name, text in manifest.versions.items())),
        ("commit", manifest.commit or "not known"),
        *[(f"hash of {name}", text) for name, text in manifest.hashes.items()],
    ]
    return [{"what": what, "value": value} for what, value in lines]


def _cost(cost: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Measured cost; where energy is not readable, why."""
    lines = []
    if isinstance(seconds := cost.get("cpu_seconds"), int | float):
        lines.append(("CPU time", f"{seconds:,.1f} s"))
    if isinstance(peak := cost.get("peak_cuda_mb"), int | float):
        lines.append(("peak GPU memory", f"{peak:,.0f} MB"))
    tokens = cost.get("tokens")
    if isinstance(tokens, dict):
        tokens = sum(n for n in tokens.values() if isinstance(n, int))
    if isinstance(tokens, int):
        lines.append(("tokens", f"{tokens:,}"))
    if (energy := watt_hours(cost)) is not None:
        lines.append(("energy", f"{energy:.2f} Wh"))
    elif reasons := cost.get("energy_not_readable"):
        lines.append(("energy", f"not readable: {'; '.join(map(str, reasons))}"))
    return lines


def _settings(artifact: Artifact) -> list[dict[str, str]]:
    """Return an artifact's configuration, nested names with dots."""
    return [
        {"setting": n, "value": v if isinstance(v, str) else json.dumps(v, default=str)}
        for n, v in flat(artifact.manifest.config).items()
    ]


def _related(heading: str, nodes: list[Node]) -> None:
    if not nodes:
        return
    st.caption(heading)
    for node in nodes:
        parts = [node.title, node.detail, "" if node.kind is MergedModel else node.key]
        label = ": ".join(part for part in parts if part)
        # A button: streamlit leaves out of a link what the page with the link binds itself.
        st.button(
            plain(label),
            icon=":material/arrow_forward:",
            type="tertiary",
            on_click=links.choose,
            args=("artifact", node.key),
            key=f"{heading} {node.key}",
        )


# What is missing, and all runs


def _checklist(listing: Listing, model: Model) -> None:
    st.subheader("What is done and what is missing", anchor=False)
    steps = checklist(listing, model)
    rows = [{"stage": s.name, "state": _state(s), "what": s.what} for s in steps]
    table(rows, "stages")
    for step in steps:
        does = "goes on with it" if step.state == UNFINISHED else "makes it"
        if step.state != DONE:
            missing(f"{step.name}: {_state(step)}. This command {does}:", step.command)
    if all(step.state == DONE for step in steps):
        st.text("Every stage is done for this model.")
    if listing.under_way:
        with st.expander(f"{listing.unfinished} unfinished folder(s)"):
            empty.unfinished(listing)


def _state(step: Step) -> str:
    if step.state == DONE:
        more = f", {len(step.unfinished)} unfinished" if step.unfinished else ""
        return f"{DONE} ({len(step.artifacts)}{more})"
    if step.state == UNFINISHED:
        return f"{UNFINISHED} ({step.unfinished[0].state.partition(';')[0]})"
    return step.state


def _row(artifact: Artifact) -> dict[str, object]:
    manifest = artifact.manifest
    return {
        "kind": artifact.kind.title,
        "what": artifact.kind.detail(artifact, one_based=links.one_based()),
        "made (UTC)": manifest.created.replace("T", " ")[:16],
        "MB": megabytes(artifact),
        "seconds": manifest.seconds,
        "CPU seconds": manifest.cost.get("cpu_seconds"),
        "peak MB": manifest.peak_memory_mb,
        "origin": "" if artifact.verifiable else "not verifiable",
        "path": artifact.relative,
    }


def _runs(listing: Listing) -> None:
    st.subheader("All runs", anchor=False)
    rows = [_row(artifact) for artifact in listing.artifacts]
    size = sum(map(megabytes, listing.artifacts))
    seconds = sum(a.manifest.seconds for a in listing.artifacts)
    st.text(f"{len(rows)} artifacts, {size:,.1f} MB, {seconds / 60:,.1f} minutes of work")
    table(rows, "runs")


@st.cache_data(show_spinner=False, max_entries=5000, hash_funcs=data.HASHES)
def megabytes(artifact: Artifact) -> float:
    """Return the size of an artifact's files."""
    try:
        return sum(p.stat().st_size for p in artifact.path.rglob("*") if p.is_file()) / 2**20
    except OSError:  # removed meanwhile
        return float("nan")
