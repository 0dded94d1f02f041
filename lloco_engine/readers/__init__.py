"""Files and folders -> Documents; what cannot be used comes out as a Failure that names the rule, and the rest go on.

`formats` names the formats, one module each; `encodings` makes text of bytes; `apart` reads what takes a parser in a
process of its own (`worker`); `jsonl` reads records; `walk` finds the files; `identity` says which document a file is.
"""

from lloco_engine.readers.identity import Identities
from lloco_engine.readers.read import SUFFIXES, Area, Reader, read_paths, size_of_files

__all__ = ["SUFFIXES", "Area", "Identities", "Reader", "read_paths", "size_of_files"]
