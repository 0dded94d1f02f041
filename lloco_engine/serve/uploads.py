"""Uploaded files on the disk, each in a folder that is named by its id: no name that was sent becomes a path."""

from __future__ import annotations

import secrets
import shutil
import time
from pathlib import Path
from typing import BinaryIO

from lloco_engine.atomic import FULL, flush_folder, new_folder
from lloco_engine.documents import printable
from lloco_engine.errors import StoreFull
from lloco_engine.readers import SUFFIXES
from lloco_engine.serve.errors import APIError
from lloco_engine.serve.records import FileRecord, Records

__all__ = ["Uploads", "suffix_of"]

_NAME_CHARS = 255


def suffix_of(filename: str) -> str:
    """The suffix by which a file is read; '' where it has none that is known."""
    suffix = Path(filename.replace("\\", "/").rpartition("/")[2]).suffix.lower()
    return suffix if suffix in SUFFIXES else ""


class Uploads:
    """The bytes of uploaded files, under one folder.

    Args:
        folder: where they lie; what a process that was killed left there unfinished is removed.
        records: what is known of them.
    """

    def __init__(self, folder: Path, records: Records) -> None:
        self._folder, self._records = folder, records
        folder.mkdir(parents=True, exist_ok=True)
        known = records.all_ids()
        for entry in folder.iterdir():  # none of these was acknowledged
            if entry.name not in known:
                shutil.rmtree(entry, ignore_errors=True)

    def add(self, filename: str, file: BinaryIO, tenant: str, purpose: str) -> FileRecord:
        """Keep a file; it and what is known of it are on the disk when this returns.

        Args:
            filename: as it was sent; it is shown, and no path.
            file: from its beginning.
            tenant: whose it is.
            purpose: as it was sent.

        Raises:
            APIError: the kind of file is not one that can be read.
            StoreFull: there is no room.
        """
        name = printable(filename.replace("\\", "/").rpartition("/")[2])[-_NAME_CHARS:] or "file"
        name = "".join(char if char.isprintable() else "\ufffd" for char in name)
        suffix = suffix_of(name)
        if not suffix:
            message = (
                f"a file must end with {', '.join(SUFFIXES)}, and {name[-80:]!r} does not; convert it, or name it so"
            )
            raise APIError(400, message, "unsupported_file", param="file")
        file_id = f"file-{secrets.token_hex(16)}"
        try:
            with new_folder(self._folder / file_id) as draft, (draft / f"content{suffix}").open("xb") as copy:
                shutil.copyfileobj(file, copy, 1 << 20)
                size = copy.tell()
        except OSError as error:
            if error.errno in FULL:
                raise StoreFull("no room for the file: free space") from error
            raise
        record = FileRecord(file_id, tenant, name, purpose, size, int(time.time()))
        self._records.add_file(record)
        return record

    def path(self, record: FileRecord) -> Path:
        """Where the bytes of a file lie."""
        return self._folder / record.id / f"content{suffix_of(record.filename)}"

    def remove(self, record: FileRecord) -> None:
        """Forget a file, then remove its bytes."""
        self._records.remove_file(record.tenant, record.id)
        shutil.rmtree(self._folder / record.id, ignore_errors=True)
        flush_folder(self._folder)
