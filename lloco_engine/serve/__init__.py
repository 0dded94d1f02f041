"""The server: a store behind an address that speaks the OpenAI API, with a page, and tools for agents.

Needs the extra ``serve``. `app` puts the parts together; `gate` is what every request passes first; `asking` turns the
API's requests into the engine's. docs/serving.md says what is answered.
"""
