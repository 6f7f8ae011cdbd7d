"""One feature's page: what it is, what it answers to, whether it survived, what it does."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode, urlsplit, urlunsplit

import streamlit as st

from resa_lens import feature_plots
from resa_lens.app import feature_evidence, tokens
from resa_lens.app.data import Listing
from resa_lens.app.feature_evidence import missing, rules_of
from resa_lens.app.features_data import (
    Activity,
    Source,
    activity,
    command,
    examples,
    mapping,
    phases_of,
    same_activity,
    verdict_of,
)
from resa_lens.app.widgets import figure, problem, table
from resa_lens.errors import BadInputError
from resa_lens.hookpoints import describe_layer
from resa_lens.prompts import PHASES

SURVIVES = "survives"
BADGES: dict[str, tuple[str, Any]] = {
    SURVIVES: (":material/check_circle:", "green"),
    "prompt artefact": (":material/help:", "orange"),
    "token detector": (":material/cancel:", "red"),
}
Go = Callable[[int, int], None]
"""Opens the page of a layer's feature; a callback."""
_PHASE_NAMES = {"prompt": "the prompt", "think": "thoughts", "answer": "the answer"}


def show(listing: Listing, source: Source, layer: int, feature: int, *, go: Go) -> None:
    """Draw the page of a feature; a part that cannot be read leaves the others.

    Args:
        listing: the workspace.
        source: the runs.
        layer: 0-based.
        feature: of the layer's SAE.
        go: opens another feature's page.
    """
    held: Activity | None = None
    with _part():
        held = activity(source, layer, feature)
    _headline(source, layer, feature, held)
    if held is None:
        _silent(listing, source, layer)
    else:
        with _part():
            _activations(held, source)
        with _part("Strongest activations"):
            _examples(source, layer, feature, held)
        with _part("What it raises and lowers"):
            _lens(listing, source, held)
        with _part("Nearest features"):
            _nearest(layer, held, go)
    with _part("Scores between reasoning and other text"):
        feature_evidence.scores(listing, source, layer, feature)
    with _part("Is it more than a token detector?"):
        feature_evidence.falsification(listing, source, layer, feature)
    with _part("What happens without it"):
        feature_evidence.ablations(listing, source, layer, feature)
        feature_evidence.attributions(listing, source, layer, feature)
    _address(source, layer, feature)


@contextmanager
def _part(title: str = "") -> Iterator[None]:
    if title:
        st.subheader(title, anchor=False)
    try:
        yield
    except BadInputError as error:
        problem(str(error))


def _headline(source: Source, layer: int, feature: int, held: Activity | None) -> None:
    st.subheader(f"Feature {feature}, {describe_layer(layer, source.n_layers)}", anchor=False)
    st.text(f"{tokens.plain(source.model)}, site {tokens.plain(source.site)}")
    with _part():
        _verdict(source, layer, feature)
    if held is None:
        return
    row, (low, high) = held.row, held.ci
    by_phase = ", ".join(
        f"{_percent(row[f'density_{phase}'])} of {_PHASE_NAMES[phase]}" for phase in PHASES
    )
    st.text(
        f"Fires at {_percent(row['density'])} of all tokens (95 % over documents "
        f"{_percent(low)} to {_percent(high)}), in {row['documents_fired']:,} of "
        f"{source.documents:,} documents. Densest in {_PHASE_NAMES[held.most]}: {by_phase}. "
        f"Where it fires its mean is {row['mean']:.3g}, its maximum {row['max']:.3g}."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _verdict(source: Source, layer: int, feature: int) -> None:
    found = verdict_of(source, layer, feature)
    if found and found.verdict in BADGES:
        icon, colour = BADGES[found.verdict]
        st.badge(found.verdict, icon=icon, color=colour)
        st.text(f"Why: {tokens.plain(found.reason)}")
        if found.verdict == SURVIVES:
            st.caption("What survives was not refuted, no more. Of all that were counted:")
            st.text(tokens.plain(_of_all(source)))
    elif found:
        st.text(tokens.plain(f"Verdict: {found.verdict}\nWhy: {found.reason}"))
    elif rules_of(source, layer, feature):
        st.badge("counted, not tested", icon=":material/help:", color="blue")
    else:
        st.badge("not counted by any rule", color="gray")


def _of_all(source: Source) -> str:
    """What the same tests leave of all counted features, beside random weights."""
    results = source.verdicts.manifest.results if source.verdicts else {}
    return str(mapping(results.get("summary")).get("reason", "not told"))


def _silent(listing: Listing, source: Source, layer: int) -> None:
    """Why there is no activity to show."""
    if source.activity is None or layer not in source.latents:
        what = "Activity was not measured" if source.activity is None else "This layer was not part"
        rest = " here" if source.activity is None else " of the activity run"
        missing(
            f"{what}{rest}; this command measures it:",
            command(listing, source, "activity", "--layers", str(layer)),
        )
        return
    tokens_read = sum(source.tokens.values())
    st.text(
        f"It fired at none of the {tokens_read:,} tokens of {source.documents:,} documents (or "
        "its row could not be read): there is no histogram and no example."
    )


def _activations(held: Activity, source: Source) -> None:
    row = held.row
    counts = row["histogram"] or []
    if len(counts) + 1 != len(held.edges):
        raise BadInputError(
            f"the histogram has {len(counts)} bins and {len(held.edges)} edges; --force of "
            "resa-lens activity makes the tables anew"
        )
    left, right = st.columns(2)
    with left:
        figure(feature_plots.activation_figure(held.edges, counts), "figure-activations")
    with right:
        densities = {phase: row[f"density_{phase}"] for phase in PHASES}
        made = feature_plots.phases_figure(densities, row["density"], held.ci, source.documents)
        figure(made, "figure-phases")
    with st.expander("Table of densities"):
        rows = [
            {
                "phase": phase,
                "tokens": source.tokens.get(phase),
                "fires at": row[f"tokens_fired_{phase}"],
                "density, %": 100 * row[f"density_{phase}"],
                "mean where it fires": row[f"mean_{phase}"],
                "maximum": row[f"max_{phase}"],
            }
            for phase in PHASES
        ]
        formats = {"density, %": "%.4f", "mean where it fires": "%.3g", "maximum": "%.3g"}
        table(rows, "density_by_phase", formats)


def _examples(source: Source, layer: int, feature: int, held: Activity) -> None:
    rows = examples(source, layer, feature)
    if not rows:
        st.text("The activity run kept no example of it.")
        return
    phases: dict[int, list[str]] = {}
    with _part():  # without phases the examples stand all the same
        phases = phases_of(source, [row["document"] for row in rows])
    tokens.legend()
    st.caption(
        "The deeper the orange, the stronger; one scale for all. The peak is framed, the line "
        "below a token is its phase, ↵ is a line's end; a token's value stands where the pointer "
        "rests."
    )
    parts, listed = [], []
    for row in rows:
        shown = [token or "" for token in row["tokens"] or []]
        acts = [value or 0.0 for value in row["acts"] or []]
        if len(shown) != len(acts):
            raise BadInputError(
                f"example {row['rank']} has {len(shown)} tokens and {len(acts)} activations; "
                "--force of resa-lens activity makes the tables anew"
            )
        peak = row["position"] - row["start"]
        around = phases.get(row["document"], [])[row["start"] : row["start"] + len(shown)]
        if len(around) != len(shown):
            around = []
        head = (
            f"Document {row['document']}, token {row['position']}, {row['phase']}: "
            f"{row['value']:.3g}"
        )
        parts.append(
            f'<div class="example"><div class="head">{html.escape(tokens.plain(head))}</div>'
            + tokens.coloured(shown, acts, most=held.row["max"], phases=around, peak=peak)
            + "</div>"
        )
        listed.append(
            {
                "document": row["document"],
                "token": row["position"],
                "phase": row["phase"],
                "activation": row["value"],
                "peak": tokens.visible(shown[peak]) if 0 <= peak < len(shown) else "",
                "text": tokens.plain("".join(shown)),
            }
        )
    style = "<style>.example{margin:0 0 .9rem}.example .head{font-size:.85rem;opacity:.75}</style>"
    st.html(style + "".join(parts))
    with st.expander("Table of examples"):
        table(listed, "examples", {"activation": "%.3g"})


def _lens(listing: Listing, source: Source, held: Activity) -> None:
    row = held.row
    if row["top_tokens"] is None:
        missing(
            "For SAEs this wide the tables keep no logit lens; this command prints it:",
            command(
                listing,
                source,
                "activity",
                "--show",
                f"{row['layer']}:{row['feature']}",
                *same_activity(source),
            ),
        )
        return
    st.caption(
        "Logit lens: the feature's direction through the model's final norm and unembedding. ␣ is "
        "a space; the numbers are logits beside those of nothing."
    )
    listed = []
    for side, name in (("top", "Raises"), ("bottom", "Lowers")):
        words = [token or "" for token in row[f"{side}_tokens"] or []]
        logits = [value or 0.0 for value in row[f"{side}_logits"] or []]
        pairs = list(zip(words, logits, strict=False))
        st.caption(name)
        st.html(tokens.chips([word for word, _ in pairs], [value for _, value in pairs]))
        listed += [
            {"side": name.lower(), "token": tokens.visible(word), "logit": value}
            for word, value in pairs
        ]
    if listed:
        with st.expander("Table of the logit lens"):
            table(listed, "logit_lens", {"logit": "%.2f"})


def _nearest(layer: int, held: Activity, go: Go) -> None:
    near = list(zip(held.row["nearest"] or [], held.row["nearest_cosines"] or [], strict=False))
    if not near:
        st.text("The tables keep no neighbours of it.")
        return
    st.caption("By the cosine of the decoder directions, in the same SAE.")
    with st.container(horizontal=True):
        # No links: one that leads to the page it stands on leaves the address as it was.
        for place, (other, cosine) in enumerate(near):
            st.button(
                f"{other} ({cosine:.2f})",
                on_click=go,
                args=(layer, other),
                key=f"near-{place}",
                type="tertiary",
                icon=":material/hub:",
                help=f"Open feature {other}",
            )


def _address(source: Source, layer: int, feature: int) -> None:
    st.subheader("Link to this page", anchor=False)
    query = {**_place(), "run": source.key, "layer": layer, "feature": feature}
    parts = urlsplit(st.context.url or "")
    where = urlunsplit((parts.scheme, parts.netloc, parts.path, urlencode(query), ""))
    st.code(where, language=None, wrap_lines=True)


def _place() -> dict[str, str]:
    return {key: st.query_params[key] for key in ("place", "one_based") if key in st.query_params}
