"""The page "Experts": maps by phase, rankings beside their nulls, effects beside random sets."""

from __future__ import annotations

from typing import Any

import streamlit as st

from resa_lens.app import empty, links
from resa_lens.app.widgets import figure, layer_columns, problems, readable, table
from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.kinds.ranking import Ranking
from resa_lens.artifacts.kinds.routing import Routing
from resa_lens.artifacts.kinds.steering import Steering
from resa_lens.artifacts.listing import Listing
from resa_lens.figures.experts import expert_null_figure, experts_figure, steering_figure
from resa_lens.figures.grids import cell
from resa_lens.stages.reports import experts as reports

PLAIN, MATCHED = "plain", "token-matched"
LISTED = 20


def show(listing: Listing) -> None:
    """Draw the page."""
    problems(listing.problems)
    runs = {kind: listing.of(kind) for kind in (Routing, Ranking, Steering)}
    if not any(runs.values()):
        empty.lacking(
            listing, "No expert was looked at", "experts", "rank", "--model", "tiny-moe-reasoner"
        )
        return
    slugs = list(dict.fromkeys(a.slug for several in runs.values() for a in several))
    slug = slugs[0]
    if len(slugs) > 1:
        slug = str(st.selectbox("Model", slugs, **links.bound("model")))
    links.about("Experts", slug)
    for kind, title, label, file, draw in (
        (Routing, "Use of the experts", "Map", "routing.json", _routing),
        (Ranking, "Experts for a target", "Ranking", "ranking.json", _ranking),
        (Steering, "Experts changed", "Change", "steering.json", _steering),
    ):
        # By path, the newest first.
        artifacts = {a.relative: a for a in runs[kind] if a.slug == slug}
        with st.container():
            if not artifacts:
                continue
            st.subheader(title, anchor=False)
            path = next(iter(artifacts))
            if len(artifacts) > 1:
                path = str(st.selectbox(label, list(artifacts), **links.bound(label.lower())))
            results = readable(artifacts[path].value, file)
            if results is not None:
                draw(artifacts[path], results)


def _routing(artifact: Artifact, results: Any) -> None:
    places = [place for place in results["tokens"] if place != "all"]
    place = str(st.radio("At the tokens of", places, horizontal=True, **links.bound("place_of")))
    # One scale for all of them: else every map looks equally strong.
    limit = max(
        row["scores"]["use"].get(name, 0.0) for row in results["experts"] for name in places
    )
    figure(
        experts_figure(
            results["experts"], f"scores.use.{place}", f"Share of tokens, {place}",
            layers=artifact.results.n_layers, limit=limit, one_based=links.one_based(),
        ),
        "figure-experts-use",
    )  # fmt: skip
    rows = [
        {
            **layer_columns(row["layer"]), "expert": row["expert"],
            **{f"use, {name}": row["scores"]["use"].get(name) for name in places},
            **{f"mass, {name}": row["scores"]["mass"].get(name) for name in places},
        }
        for row in results["experts"]
    ]  # fmt: skip
    table(rows, "experts", "Table of all experts")
    st.caption(
        f"{artifact.results.documents} documents; the document is the unit. Most of the routing is "
        "the token: by layer the token alone predicts "
        + ", ".join(f"{100 * row['predicted_by_token']:.0f}" for row in results["routers"])
        + " % of the slots."
    )


def _ranking(artifact: Artifact, results: Any) -> None:
    experts, null = results["experts"], results["null"]
    matched = "rd-matched" in experts[0]["scores"]
    measures = {PLAIN: "rd", MATCHED: "rd-matched"} if matched else {PLAIN: "rd"}
    which = str(
        st.radio("Difference", list(measures), horizontal=True, **links.bound("difference"))
    )
    limit = max(abs(row["scores"][name]) for row in experts for name in measures.values())
    figure(
        experts_figure(
            experts, f"scores.{measures[which]}", f"{results['target']}: {which} difference",
            limit=limit, one_based=links.one_based(),
        ),
        "figure-experts-map",
    )  # fmt: skip
    types = null["token_types"]
    title = f"Best experts for {results['target']} by {results['by']}, and the null"
    figure(
        expert_null_figure(
            experts, results["by"], types["best"] if types else (), title,
            one_based=links.one_based(),
        ),
        "figure-experts-null",
    )  # fmt: skip
    rows = [
        {
            **layer_columns(row["layer"]), "expert": row["expert"], **row["scores"],
            "p, labels": row["p_value"], "Holm": row["p_holm"], "p, tokens": row["type_p"],
        }
        for row in experts
    ]  # fmt: skip
    table(rows, "ranking", "Table of all experts")
    _sentences(reports.ranking("", {**results, "folder": artifact.relative}, LISTED))


def _steering(artifact: Artifact, results: Any) -> None:
    figure(steering_figure(results), "figure-experts-steering")
    rows = [
        {
            "experts": dose["experts"],
            **{f"{p}, nats": cell(f"{{loss.{p}.change:.4f}}", dose) for p in dose["loss"]},
            "accuracy, %": 100 * dose["accuracy"], "change, points": 100
            * dose["effect"]["difference"], "tokens": dose["tokens"]["mean"],
        }
        for dose in results["doses"]
    ]  # fmt: skip
    table(rows, "steering")
    _sentences(reports.steering(artifact.slug, {**results, "folder": artifact.relative}))


def _sentences(parts: Any) -> None:
    for text in parts:
        if isinstance(text, str):
            st.text(text)
