"""Learning offline: LoRA adapters that teach a decoder to read compressed context (docs/finetuning.md)."""
