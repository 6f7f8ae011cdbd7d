"""`python -m resa_lens`: what torchrun and accelerate launch start."""

from resa_lens.cli import main

main()
