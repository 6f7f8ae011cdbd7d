"""How often the verdicts of falsification are wrong of planted features, as it was measured.

`benchmarks/falsification_battery.py` plants the features and writes the figures, with the default
number of texts and the default share of firing: with others the verdicts err more or less often.
"""

from __future__ import annotations

import json
from typing import Any

from resa_lens.resources import data_path


def error_rates() -> dict[str, Any]:
    """Return the battery's figures.

    `false_kills` is the share of true kinds that are refuted, `false_survivals` that of false kinds
    that stand, `noisy_survivals` that of noisy detectors of the tag that stand, each with its
    errors, n and 95 % interval (Clopper and Pearson); `kinds` is the confusion matrix, {kind:
    {true, expected, as_expected, n, verdicts}}; `settings` and `draws` say of what.
    """
    return json.loads(data_path("falsification_battery.json").read_text())


def in_words() -> str:
    """Say the error rates in a sentence, without a full stop."""
    rates = error_rates()
    names = {
        "false_kills": "true ones refuted",
        "false_survivals": "false ones stand",
        "noisy_survivals": "noisy detectors of the tag stand",
    }
    parts = [f"{rates[key]['errors']} of {rates[key]['n']} {name}" for key, name in names.items()]
    return f"of planted features {', '.join(parts)}"
