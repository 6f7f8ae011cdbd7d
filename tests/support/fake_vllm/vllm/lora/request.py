"""An adapter of a request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LoRARequest:
    """An adapter's name, number and folder."""

    lora_name: str
    lora_int_id: int
    lora_path: str
