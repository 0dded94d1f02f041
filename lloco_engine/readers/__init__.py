"""Files and folders -> Documents; what cannot be used comes out as a Failure that names the rule, and the rest go on.

One format per file: `formats` (plain text, Markdown, HTML, PDF), `jsonl`; `walk` finds the files.
"""

from lloco_engine.readers.read import MAX_BYTES, SUFFIXES, read_paths

__all__ = ["MAX_BYTES", "SUFFIXES", "read_paths"]
