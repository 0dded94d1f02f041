"""The command ``lloco``. Importing it loads no model library; each command loads what it needs when it runs."""

from lloco_engine.cli.app import app, main

__all__ = ["app", "main"]
