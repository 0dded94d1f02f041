"""A copy of a store that is whole: of one state, made beside readers and a writer, there wholly or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from lloco_engine.atomic import FULL, flush_folder, move
from lloco_engine.errors import StoreCorrupt, StoreError, StoreFull, StoreNotFound
from lloco_engine.store.adapters import adapter_files
from lloco_engine.store.catalogue import Catalogue
from lloco_engine.store.connecting import connect
from lloco_engine.store.files import Layout
from lloco_engine.store.lock import write_lock
from lloco_engine.store.verify import verify_store

__all__ = ["copy_store"]

Progress = Callable[[int, int], None]
_TRIES = 5  # without the write lock, before a writer that never rests is asked to wait


def copy_store(
    source: str | Path, dest: str | Path, *, link: bool = False, progress: Progress | None = None, timeout: float = 60.0
) -> None:
    """Copy a store to a folder that is not there yet, and check every byte of the copy.

    No file of a store is ever written to in place, so a hard link is as good as a copy as long as the disk is: a
    damaged block damages both.

    Args:
        source: the store's folder. Others may read and write it meanwhile; the copy is one state of it.
        dest: the new folder. It appears when it is whole.
        link: make hard links to segments, index and adapters where the file system can, instead of copies.
        progress: called with files done and files in all.
        timeout: seconds to wait for a writer, where one removes files quicker than they are copied.

    Raises:
        StoreNotFound: there is no store at ``source``.
        StoreError: ``dest`` is there already, or cannot be written.
        StoreCorrupt: the store is damaged; ``dest`` is not there.
        StoreFull: no room; ``dest`` is not there.
    """
    layout, dest = Layout(source), Layout(dest).root
    if not layout.manifest.exists() and not layout.catalogue.exists():
        raise StoreNotFound(f"there is no store at {source}")
    if os.path.lexists(dest) and (not dest.is_dir() or any(dest.iterdir())):
        raise StoreError(f"a store is copied to a folder that is missing or empty, and {dest} is there: name another")
    draft = dest.with_name(f".{dest.name}.unfinished")
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        with write_lock(dest.with_name(f".{dest.name}.lock"), timeout):
            try:
                _remove(draft)  # of a process that was killed, for the lock is ours
                _Copy(layout, Layout(draft), link, progress).run(timeout)
                if damage := [problem for problem in verify_store(draft) if problem.kind != "orphan"]:
                    raise StoreCorrupt(
                        f"{source} is damaged and was not copied ({damage[0].path}: {damage[0].detail}); "
                        f"{len(damage)} problem(s), see `lloco verify`"
                    )
                flush_folder(draft)
                move(draft, dest)  # over an empty folder, if there is one
            finally:
                _remove(draft)
                with suppress(OSError):
                    dest.with_name(f".{dest.name}.lock").unlink()
    except OSError as error:
        if error.errno in FULL:
            raise StoreFull(f"no room to copy {source} to {dest} ({error.strerror}): free space") from error
        raise StoreError(f"cannot copy {source} to {dest}: {error}") from error


def _remove(folder: Path) -> None:
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)


class _Copy:
    """One copy in the making."""

    def __init__(self, source: Layout, draft: Layout, link: bool, progress: Progress | None) -> None:
        self._source, self._draft, self._link, self._progress = source, draft, link, progress

    def run(self, timeout: float) -> None:
        self._draft.root.mkdir()
        for _ in range(_TRIES):
            if self._once():
                return
        with write_lock(self._source.lock, timeout):
            if not self._once():
                raise StoreCorrupt(f"files of {self._source.root} are missing; see `lloco verify`")

    def _once(self) -> bool:
        """Copy a state, and the files that it names; False where a writer has removed one of them meanwhile."""
        names = self._catalogue()
        shutil.copyfile(self._source.manifest, self._draft.manifest)
        for done, name in enumerate(names, start=1):
            if not (self._draft.root / name).exists() and not self._file(name):
                return False
            if self._progress is not None:
                self._progress(done, len(names))
        wanted = {self._draft.root / name for name in names}
        kept = {self._draft.manifest, self._draft.catalogue}
        for path in [path for path in self._draft.root.rglob("*") if path.is_file()]:
            if path not in wanted | kept:  # of a state before
                path.unlink()
        for path in (self._draft.manifest, self._draft.catalogue):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        return True

    def _catalogue(self) -> list[str]:
        """Copy the catalogue; the files that it names, relative to the store."""
        self._draft.catalogue.unlink(missing_ok=True)
        with closing(Catalogue(self._source.catalogue)) as live, closing(live.copy()) as state:
            with state.errors():
                made = connect(self._draft.catalogue)
                try:
                    state.connection.backup(made)
                finally:
                    made.close()
            with state.transaction():
                names = [self._source.segment(segment_id) for segment_id in state.segment_rows()]
                if (recorded := state.index_file()) is not None:
                    names.append(self._source.index_file(recorded[0]))
            names += adapter_files(self._source, state)
        return sorted(map(self._source.relative, names))

    def _file(self, name: str) -> bool:
        source, target = self._source.root / name, self._draft.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if self._link:
            try:
                os.link(source, target)
                return True
            except FileNotFoundError:
                return False
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
                    raise
        try:
            shutil.copyfile(source, target)
        except FileNotFoundError:
            target.unlink(missing_ok=True)
            return False
        with target.open("rb") as file:
            os.fsync(file.fileno())
        return True
