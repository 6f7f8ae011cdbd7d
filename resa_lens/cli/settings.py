"""Options from a file: YAML of their names and values."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from resa_lens.config import bare
from resa_lens.errors import BadInputError
from resa_lens.files import named_path, read_text

if TYPE_CHECKING:
    from resa_lens.cli.options import Option


def read_settings(file: str, options: Mapping[str, Option]) -> dict[str, Any]:
    """Read the values of options from a YAML file.

    Returns:
        The values by the options' keys, as words of a command line.

    Raises:
        BadInputError: no such file, no YAML, an option that the command has not, or a value that no
            option takes.
    """
    import yaml

    try:
        values = yaml.safe_load(read_text(named_path(file, "--config"), "--config"))
    # Of a date that is none, PyYAML raises a ValueError.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise BadInputError(f"--config {file} is no YAML: {reason}") from error
    if not isinstance(values, Mapping):
        raise BadInputError(f"--config {file} holds no options; write for example `tokens: 20000`")
    known = {option.label.lstrip("-").replace("_", "-"): option for option in options.values()}
    words: dict[str, Any] = {}
    for name, value in values.items():
        option = known.get(str(name).replace("_", "-"))
        if option is None:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            raise BadInputError(
                f"--config {file}: {str(name)!a:.80} is no option of this command; the nearest is "
                f"{near[0]!r}"
            )
        if value is not None:
            words[option.key] = _word(file, str(name), option, value)
    return words


def _word(file: str, name: str, option: Option, value: Any) -> Any:
    flag = bare(option.kind)[0] is bool
    several = str(bare(option.kind)[0]).startswith(("list", "tuple"))
    values = value if several and isinstance(value, list) else [value]
    if flag != isinstance(value, bool) or not all(isinstance(v, str | int | float) for v in values):
        form = "true or false" if flag else "one value" + (", or a list" if several else "")
        raise BadInputError(f"--config {file}: {name} is {value!r:.60}; give {form}")
    words = [str(v) for v in values]
    return value if flag else words if several else words[0]
