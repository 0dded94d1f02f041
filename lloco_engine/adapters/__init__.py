"""LoRA adapters on disk: what one was trained with, and the versions that a store keeps of each group's."""
