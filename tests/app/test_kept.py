"""The texts of a session side by side, with what a worker would answer."""

from __future__ import annotations

import numpy as np
from app_driver import texts
from streamlit.testing.v1 import AppTest

from resa_lens.app.lab import data as lab_data

SIZE = 90


def _script() -> None:
    from types import SimpleNamespace
    from typing import Any

    import streamlit as st

    from resa_lens.app.lab import kept
    from resa_lens.texts.prompts import PHASES

    for number in (1, 2, 3):
        document = {"ids": [number], "tokens": ["a"], "phases": PHASES[:1], "prompt_tokens": 1}
        request = {"model": "m", "text": f"text {number}", "question": ""}
        kept.note(request, document)
    layer = int(st.number_input("Layer", key="layer", value=1))
    stand_in: Any = SimpleNamespace(results=SimpleNamespace(n_layers=4))
    kept.show(stand_in, stand_in, {layer: [5]})


def test_another_pair_of_texts_or_layer_begins_at_the_first_page(monkeypatch):
    def follow(_kind, request, _key):
        values = np.random.default_rng(request["ids"][0]).random(SIZE)
        return {"features": range(SIZE), "values": values, "starts": [0, SIZE], "size": SIZE}

    monkeypatch.setattr(lab_data, "follow", follow)
    monkeypatch.setattr(lab_data, "place", lambda *_: {})
    monkeypatch.setattr(lab_data, "answer_line", lambda *_: "")
    app = AppTest.from_function(_script)
    app.query_params["differing_page"] = "3"
    app.run(timeout=20)
    assert not app.exception
    assert "rows 41 to 60 of 90" in texts(app)
    assert "rows 41 to 60 of 90" in texts(app.run())
    app.multiselect[0].set_value([1, 3]).run()
    assert "rows 1 to 20 of 90" in texts(app)
    app.session_state["differing_page"] = 2
    assert "rows 21 to 40 of 90" in texts(app.run())
    app.number_input(key="layer").set_value(2).run()
    assert "rows 1 to 20 of 90" in texts(app)
