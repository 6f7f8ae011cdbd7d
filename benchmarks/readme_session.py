"""Run the Python session of the README and put what it prints below it.

    python -m benchmarks.readme_session

Two minutes on two CPU cores; the results lie in a folder that is removed afterwards.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
CODE = re.compile(r"```python session\n(.*?)```", re.DOTALL)
OUTPUT = re.compile(r"(?<=```text session\n).*?(?=```)", re.DOTALL)


def main() -> None:
    """Run the session in an empty folder and write its output into the README."""
    text = README.read_text(encoding="utf-8")
    (code,) = CODE.findall(text)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    output = "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())
    README.write_text(OUTPUT.sub(lambda _: output, text, count=1), encoding="utf-8")


if __name__ == "__main__":
    main()
