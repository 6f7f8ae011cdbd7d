"""The command line of the experiment; see the package."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import insertion_experiment as experiment
from benchmarks.insertion_experiment.analysis import analyse, collect
from benchmarks.insertion_experiment.draws import DRAWS, run


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=experiment.__doc__)
    parser.add_argument("what", choices=("run", "analyse", "collect"))
    parser.add_argument("--into", type=Path, default=Path("data/experiment/insertion"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--draws", type=int, nargs="+", default=list(DRAWS))
    parser.add_argument("--cells", default="ABCEHGDJKFI")
    args = parser.parse_args()
    if args.what == "run":
        run(args.work, args.draws, args.cells)
    elif args.what == "analyse":
        analyse(args.work, args.draws)
    else:
        collect(args.work, args.draws, args.into)


if __name__ == "__main__":
    main()
