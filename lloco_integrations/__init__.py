"""LLoCO inside other frameworks. Everything here is built on the public engine, and nothing in the engine knows it."""
