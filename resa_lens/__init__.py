"""resa-lens: find where in a language model reasoning lives, and tune through what was found."""

__version__ = "0.1.0"
