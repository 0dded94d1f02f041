"""LLoCO's memories served by vLLM: what its servers read, and the engine's questions to them (docs/vllm.md)."""
