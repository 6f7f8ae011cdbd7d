"""Requirements with hashes, and the licences of what is installed.

    python benchmarks/requirements.py             write requirements.txt anew
    python benchmarks/requirements.py --licences  list every installed package with its licence

The first asks pip what `-c constraints.txt -e ".[dev]"` installs here (Linux x86-64, Python 3.11)
and writes every package with its version and the SHA-256 of its file; nothing is installed.  The
packages are those of the index that pip is set up with: torch's file is the build for CPUs where
that index has it, which is the one that constraints.txt was tested with.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HEAD = """\
# Every package of resa-lens[dev] with the SHA-256 of its file: Linux x86-64, Python 3.11, CPU.
# Written by benchmarks/requirements.py from constraints.txt; torch's file is its build for CPUs.
#     pip install --require-hashes -r requirements.txt && pip install --no-deps -e .
"""


def canonical(name: str) -> str:
    """Return a package's name as indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(report: dict[str, Any]) -> str:
    """Return the text of a requirements file from what pip reports that it would install.

    Raises:
        ValueError: a package has no hash.
    """
    lines = []
    for item in report["install"]:
        name, version = item["metadata"]["name"], item["metadata"]["version"].partition("+")[0]
        if "dir_info" in item["download_info"]:  # the checkout itself
            continue
        digest = item["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        if not digest:
            raise ValueError(f"{name} {version} has no SHA-256; use an index that gives it")
        lines.append(f"{canonical(name)}=={version} \\\n    --hash=sha256:{digest}\n")
    return HEAD + "".join(sorted(lines))


def licences() -> list[tuple[str, str, str]]:
    """Return name, version and licence of every installed package, by name."""
    rows = []
    for package in metadata.distributions():
        about: Any = package.metadata  # typed without get
        classes = [c.split(" :: ")[-1] for c in about.get_all("Classifier") or ()
                   if c.startswith("License ::") and c != "License :: OSI Approved"]  # fmt: skip
        # A whole text stands in some packages' field.
        text = (about.get("License") or "").strip().split("\n")[0]
        known = about.get("License-Expression") or ", ".join(classes) or text[:60] or "not stated"
        rows.append((about["Name"], package.version, known))
    return sorted(set(rows), key=lambda row: canonical(row[0]))


def main() -> None:
    """Write the file, or list the licences."""
    if sys.argv[1:] == ["--licences"]:
        for name, version, licence in licences():
            print(f"{name:40} {version:16} {licence}")
        return
    if sys.argv[1:]:
        sys.exit(f"error: {sys.argv[1]!r} is no option; use --licences or none")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed",
               "--report", "-", "-c", "constraints.txt", "-e", ".[dev]"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    (ROOT / "requirements.txt").write_text(requirements(json.loads(done.stdout)))


if __name__ == "__main__":
    main()
