"""What the tests of the features page read of it."""

from __future__ import annotations

import pandas as pd
from synthetic_workspace import Size

from resa_lens.app import data
from resa_lens.app.features import data as features_data

SMALL = Size(layers=3, latents=1500)


def shown(app) -> pd.DataFrame:
    """The table of features."""
    return next(d.value for d in app.dataframe if "raises" in d.value.columns)


def tables(app) -> dict[str, pd.DataFrame]:
    return {d.value.columns[0]: d.value for d in app.dataframe}


def commands(app) -> str:
    return "\n".join(code.value for code in app.code)


def source_of(root):
    return features_data.sources(data.scan(str(root)))[0]


def source_row(root, layer: int, feature: int) -> dict:
    """A feature's row of the newest activity run."""
    return features_data.activity(source_of(root), layer, feature).row


def pairs(frame) -> list[tuple[int, int]]:
    return list(zip(frame.iloc[:, 0], frame["feature"], strict=True))


def listed(selection) -> list[tuple[int, int]]:
    """Layer and feature of every row that matches, in order."""
    rows = selection.rows.iloc[selection.index]
    return list(zip(rows["layer"].tolist(), rows["feature"].tolist(), strict=True))
