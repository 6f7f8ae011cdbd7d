"""The page "Overview": the answers first, then what the workspace holds, and what it lacks."""

from __future__ import annotations

import re
from pathlib import Path

import streamlit as st

from resa_lens.app import data, described, empty, lineage, links, stages
from resa_lens.app.lineage import Graph, Node
from resa_lens.app.listing import Artifact, Listing
from resa_lens.app.stages import DONE, UNFINISHED, Model, Step
from resa_lens.app.widgets import figure, problem, problems, table
from resa_lens.errors import BadInputError
from resa_lens.hookpoints import describe_layer
from resa_lens.layers import SUPPORTED

_FORMATS = {"MB": "%.2f", "seconds": "%.1f", "CPU seconds": "%.1f", "peak MB": "%.0f"}
_PAGES = {
    "saes": links.LAYERS,
    "counts": links.LAYERS,
    "quality": links.LAYERS,
    "recommendation": links.LAYERS,
    "effects": links.LAYERS,
    "stability": links.LAYERS,
    "sweep": links.LAYERS,
    "activity": links.FEATURES,
    "scores": links.FEATURES,
    "falsification": links.FEATURES,
    "ablation": links.FEATURES,
    "attribution": links.FEATURES,
    "matches": links.FEATURES,
    "adapter": links.SCORES,
    "eval": links.SCORES,
    lineage.MODEL: links.LAB,
}
"""Where an artifact of a kind is shown."""
_PAGE_NAMES = {
    links.LAYERS: "Layers",
    links.FEATURES: "Features",
    links.SCORES: "Scores",
    links.LAB: "Prompt lab",
}
# The graph keeps its width on a phone and scrolls inside its own box.
_SCROLL = (
    "<style>.st-key-lineage-box{overflow-x:auto}.st-key-lineage-box>div{min-width:820px}</style>"
)


def show(listing: Listing) -> None:
    """Draw the page."""
    known = stages.models(listing)
    if not known:
        _problems(listing)
        empty.nothing(listing)
        return
    model = _model(listing, known)
    columns = st.columns(4)
    with columns[0].container(border=True, height="stretch"):
        _which_model(listing, model)
    with columns[1].container(border=True, height="stretch"):
        _which_layers(listing, model)
    with columns[2].container(border=True, height="stretch"):
        _which_survive(listing, model)
    last = columns[3].container(border=True, height="stretch")
    _problems(listing)
    with st.container():
        _lineage(listing)
    with st.container():
        _checklist(listing, model)
    with st.container():
        _runs(listing)
    # Compares question by question: what else the page says is there before.
    with last:
        _did_tuning_help(listing, model)


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


def _model(listing: Listing, known: list[Model]) -> Model:
    """Choose the model that the page is about."""
    # Not those that were only scored, or drawn at random as a control.
    made = {a.weights for a in listing.artifacts if a.manifest.kind != "eval"}
    chosen = [m for m in known if not m.drawn and m.weights in made] or known
    if len(chosen) == 1:
        return chosen[0]
    by_slug = {model.slug: model for model in chosen}
    return by_slug[str(st.selectbox("Model", list(by_slug), key="about", **links.BOUND))]


def _which_model(listing: Listing, model: Model) -> None:
    st.caption("Which model?")
    st.text(model.name.rstrip("/").rpartition("/")[2])
    of_model = [a for a in listing.artifacts if a.weights == model.weights]
    said = [f"weights {model.weights[:8]}, {len(of_model)} artifact(s)"]
    layers = [n for a in of_model if isinstance(n := a.manifest.results.get("n_layers"), int)]
    if layers:
        said.insert(0, f"{layers[0]} layers")
    st.text("; ".join(said))
    links.to(links.LAB, "Prompt lab", icon=":material/science:")


def _which_layers(listing: Listing, model: Model) -> None:
    st.caption("Which layers carry features?")
    found = [a for a in listing.of("recommendation") if a.weights == model.weights]
    if not found:
        st.text("No recommendation yet.")
    else:
        results = found[0].manifest.results
        try:
            n_layers = int(results["n_layers"])
            names = [describe_layer(int(n), n_layers) for n in results["recommended"]]
            verdict, rule = str(results["verdict"]), str(found[0].manifest.config.get("rule"))
        except (KeyError, TypeError, ValueError):
            st.text(f"{found[0].relative} is damaged or of another version; make it again.")
        else:
            if verdict == SUPPORTED:
                st.text("; ".join(names))
            else:
                st.text(f"None is told from the others. A place to try: {'; '.join(names)}")
            st.text(f"verdict: {verdict}, rule {rule}")
    links.to(links.LAYERS, "Layers", icon=":material/layers:", model=model.slug)


def _which_survive(listing: Listing, model: Model) -> None:
    st.caption("How many counted features survive tests?")
    found = [a for a in listing.of("falsification") if a.weights == model.weights]
    if not found:
        st.text("Not tested yet.")
    else:
        try:
            rules = found[0].manifest.results["summary"]["rules"]
            row = max(rules, key=lambda row: int(row["counted"]))
            counted, survivors = int(row["counted"]), int(row["survivors"])
            low, high = (100 * float(value) for value in row["ci"])
            reason = str(found[0].manifest.results["summary"]["reason"])
        except (KeyError, TypeError, ValueError):
            st.text(f"{found[0].relative} is damaged or of another version; make it again.")
        else:
            st.text(f"{survivors} of {counted}" if counted else "None is counted.")
            if counted:
                st.text(f"rule {row['rule']}; 95 % {low:.0f} to {high:.0f} %")
                st.text(reason)
    where = {}
    if found and (made := data.activity_of(listing, str(found[0].manifest.config.get("saes")))):
        where = {"run": made.relative}
    links.to(links.FEATURES, "Features", icon=":material/grid_view:", **where)


def _did_tuning_help(listing: Listing, model: Model) -> None:
    st.caption("Did tuning help?")
    found = data.tunings(listing, model.weights)
    through = [t for t in found if not t.adapter.manifest.config.get("control")]
    # On the same questions as what they stand beside.
    base = through[0].base.relative if through else None
    controls = [
        t
        for t in found
        if t.adapter.manifest.config.get("control") and base in (None, t.base.relative)
    ]
    sweeps = [a for a in listing.of("sweep") if a.weights == model.weights]
    try:
        if through:
            paired = data.comparison(through[0])
            low, high = (100 * value for value in paired.ci)
            st.text(f"{100 * paired.difference:+.1f} points (95 % {low:+.1f} to {high:+.1f})")
            st.text(f"{_helped(paired.ci)}; p = {paired.p_value:.2g}, n = {paired.n:,}")
            said = lineage.detail(through[0].adapter, one_based=links.one_based())
            newest = f", the newest of {len(through)}" if through[1:] else ""
            st.text(f"tuned at {said}{newest}" if said else f"without an SAE{newest}")
        else:
            st.text("No adapter is scored beside its base yet.")
        if through and controls:
            control = controls[0].adapter.manifest.config["control"]
            # Against the control itself: both may have moved from the base alike.
            beside = data.Tuning(through[0].adapter, controls[0].tuned, through[0].tuned)
            for said, pair in (
                (f"control {control}", controls[0]),
                (f"tuned minus {control}", beside),
            ):
                paired = data.comparison(pair)
                low, high = (100 * value for value in paired.ci)
                st.text(f"{said}: {100 * paired.difference:+.1f} ({low:+.1f} to {high:+.1f})")
    except BadInputError as error:
        st.text(str(error))
    links.to(links.SCORES, "Scores", icon=":material/query_stats:")
    if sweeps:
        links.to(links.LAYERS, f"Sweeps: {len(sweeps)}", icon=":material/stacks:", model=model.slug)


def _helped(interval: tuple[float, float]) -> str:
    low, high = interval
    if low > 0:
        return "above the untuned model"
    return "below the untuned model" if high < 0 else "not told from no change"


# The graph


def _lineage(listing: Listing) -> None:
    from resa_lens.lineage_plots import lineage_figure

    st.subheader("What came from what", anchor=False)
    st.caption(
        "A square is an artifact; lines lead from what it was made from. A pile stands for several "
        "alike ones, a hollow square for one that is not in this workspace. Click a square, or "
        "choose below."
    )
    graph = lineage.build(listing, one_based=links.one_based())
    folded = [a.relative for n in graph.nodes if len(n.members) > 1 for a in n.members]
    folded += [missing.key for node in graph.nodes for missing in node.absent]
    # Before the choice below exists, as on a link's first run, only the address holds it.
    key = st.session_state.get("artifact") or st.query_params.get("artifact")
    node = graph.node(str(key)) if key else None
    st.html(_SCROLL)
    with st.container(key="lineage-box"):
        figure(
            lineage_figure(
                graph.nodes,
                graph.edges,
                headings=[name for name, _ in lineage.COLUMNS],
                chosen=node.key if node else None,
            ),
            "lineage",
            select=_clicked,
            alt=f"Lineage of {len(graph.nodes)} artifacts; the choice below says the same in words",
        )
    chosen = st.selectbox(
        "Artifact",
        [*(node.key for node in graph.nodes), *folded],
        index=None,
        placeholder="Choose an artifact",
        key="artifact",
        **links.BOUND,
    )
    if chosen and (node := graph.node(str(chosen))):
        with st.container(border=True):
            _chosen(listing, graph, node, str(chosen))


def _clicked() -> None:
    """Choose the node that was clicked, before the page runs again."""
    points = st.session_state["lineage"]["selection"]["points"]
    if points:
        held = points[0]["customdata"]
        st.session_state["artifact"] = held[0] if isinstance(held, list | tuple) else held


def _choose(key: str) -> None:
    st.session_state["artifact"] = key


def _chosen(listing: Listing, graph: Graph, node: Node, key: str) -> None:
    """Everything of a node, or of one artifact that is folded into it."""
    artifact = listing.at(key)
    if artifact:
        _artifact(artifact)
    elif node.missing:
        st.text(f"{node.title} that something here was made from; not in this workspace.")
        for missing in [n for n in node.absent if n.key == key] or node.absent or (node,):
            if missing.command:
                st.text(f"This command makes {missing.key}:")
                st.code(missing.command, language="bash", wrap_lines=True)
            else:
                st.text(f"It lies elsewhere: {missing.key}")
    elif node.members:
        st.text(f"{node.title} with the same parents; choose one above by its path.")
        table([_row(member) for member in node.members], "folded", _FORMATS)
    else:
        model = next((m for m in stages.models(listing) if node.key == f"model {m.slug}"), None)
        made = [a for a in listing.artifacts if model and a.weights == model.weights]
        st.text(f"The model {node.title}, {node.detail}; {len(made)} artifact(s) were made of it.")
    page = _PAGES.get(node.kind)
    if page and not node.missing:
        where = _address(listing, artifact) if artifact else {}
        links.to(page, f"Open in {_PAGE_NAMES[page]}", icon=":material/open_in_new:", **where)
    _related("Made from", graph.parents(node))
    _related("Made of it", graph.children(node))


def _address(listing: Listing, artifact: Artifact) -> dict[str, str]:
    """What the page that shows an artifact is to have chosen."""
    kind, path = artifact.manifest.kind, artifact.relative
    if kind == "activity":
        return {"run": path}
    if kind == "eval":
        return {"right" if lineage.adapted(artifact) else "left": path}
    if _PAGES[kind] == links.FEATURES:
        saes = artifact.manifest.config.get("saes")
        made = data.activity_of(listing, str(saes))
        return {"run": made.relative} if made else {}
    if _PAGES[kind] != links.LAYERS:
        return {}
    chosen = {"counts": "counts", "recommendation": "recommendation", "sweep": "sweep"}
    address = {chosen[kind]: path} if kind in chosen else {}
    counts = str(artifact.manifest.config.get("counts"))
    if kind == "recommendation" and listing.at(counts):
        address["counts"] = counts
    return {"model": _slug_of(listing, artifact), **address}


def _slug_of(listing: Listing, artifact: Artifact) -> str:
    found = stages.model_of(artifact, stages.models(listing))
    return found.slug if found else ""


def _artifact(artifact: Artifact) -> None:
    st.text(described.sentence(artifact))
    st.code(described.command(artifact), language="bash", wrap_lines=True)
    for text in described.warnings(artifact):
        st.badge("warning", icon=":material/warning:", color="orange")
        st.text(text)
    size = megabytes(str(artifact.path), artifact.manifest.created)
    name = artifact.path.name
    table(described.rows(artifact, size), f"manifest_{name}", {})
    with st.expander("Configuration"):
        table(described.settings(artifact), f"configuration_{name}", {})


def _related(heading: str, nodes: list[Node]) -> None:
    if not nodes:
        return
    st.caption(heading)
    for node in nodes:
        parts = [node.title, node.detail, "" if node.kind == lineage.MODEL else node.key]
        label = ": ".join(part for part in parts if part)
        # A button: streamlit leaves out of a link what the page with the link binds itself.
        st.button(
            plain(label),
            icon=":material/arrow_forward:",
            type="tertiary",
            on_click=_choose,
            args=(node.key,),
            key=f"{heading} {node.key}",
        )


def plain(text: str) -> str:
    """Text from a file for a label, which is read as Markdown: every mark stands as it is."""
    return re.sub(r"([\\`*_{}\[\]()<>#+\-.!|~:$&])", r"\\\1", text)


# What is missing, and all runs


def _checklist(listing: Listing, model: Model) -> None:
    st.subheader("What is done and what is missing", anchor=False)
    steps = stages.checklist(listing, model)
    rows = [{"stage": s.stage.name, "state": _state(s), "what": s.stage.what} for s in steps]
    table(rows, "stages", {})
    lacking = [step for step in steps if step.state != DONE]
    for step in lacking:
        st.text(f"{step.stage.name}: {_state(step)}. This command {_does(step)}:")
        st.code(step.command, language="bash", wrap_lines=True)
    if not lacking:
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


def _does(step: Step) -> str:
    return "goes on with it" if step.state == UNFINISHED else "makes it"


def _row(artifact: Artifact) -> dict[str, object]:
    manifest = artifact.manifest
    return {
        "kind": lineage.NAMES.get(manifest.kind, manifest.kind),
        "what": lineage.detail(artifact, one_based=links.one_based()),
        "made (UTC)": manifest.created.replace("T", " ")[:16],
        "MB": megabytes(str(artifact.path), manifest.created),
        "seconds": manifest.seconds,
        "CPU seconds": manifest.cost.get("cpu_seconds"),
        "peak MB": manifest.peak_memory_mb,
        "path": artifact.relative,
    }


def _runs(listing: Listing) -> None:
    st.subheader("All runs", anchor=False)
    rows = [_row(artifact) for artifact in listing.artifacts]
    size = sum(megabytes(str(a.path), a.manifest.created) for a in listing.artifacts)
    seconds = sum(a.manifest.seconds for a in listing.artifacts)
    st.text(f"{len(rows)} artifacts, {size:,.1f} MB, {seconds / 60:,.1f} minutes of work")
    table(rows, "runs", _FORMATS)


@st.cache_data(show_spinner=False, max_entries=5000)
def megabytes(folder: str, made: str) -> float:
    """Size of an artifact's files; `made` is a part of the cache's key."""
    try:
        return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()) / 2**20
    except OSError:  # removed meanwhile
        return float("nan")
