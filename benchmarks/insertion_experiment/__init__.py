"""Does tuning through an SAE do anything where there is something to hand on?

The registered experiment (docs/experiment-insertion.md): six damages of one MLP of tiny-reasoner,
the source's SAE and its controls inserted, and eleven ways of tuning at one budget.

    python -m benchmarks.insertion_experiment run --work FOLDER [--cells ABC] [--draws 100 101]
    python -m benchmarks.insertion_experiment analyse --work FOLDER

`run` writes a file a cell and goes on where it was killed; `analyse` refuses to look at a contrast
before every draw has its cells.
"""
