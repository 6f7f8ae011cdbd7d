"""Where the bundled data lies: in a checkout `data/`, in a wheel `resa_lens/_data/`."""

from __future__ import annotations

from pathlib import Path

from resa_lens.errors import BadInputError

_PACKAGE = Path(__file__).resolve().parent


def data_path(relative: str = "") -> Path:
    """Return the path of a bundled file or folder.

    Raises:
        BadInputError: neither the checkout nor the wheel holds it.
    """
    # The wheel's first: beside an installed package `data` may be somebody else's.
    roots = (_PACKAGE / "_data", _PACKAGE.parent / "data")
    for root in roots:
        if (root / relative).exists():
            return root / relative
    raise BadInputError(
        f"bundled file {relative!r} not found; looked in {roots[0]} and {roots[1]}. "
        "Reinstall resa-lens or use a full checkout."
    )


def app_script() -> Path:
    """Return the script that streamlit runs: in a checkout apps/, in a wheel the bundled copy."""
    bundled = _PACKAGE / "_data" / "feature_explorer.py"
    return bundled if bundled.exists() else _PACKAGE.parent / "apps" / "feature_explorer.py"
