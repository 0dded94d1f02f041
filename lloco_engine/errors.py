"""Every error the engine raises on purpose.

::

    LLoCOError
    ├── ConfigError            a setting is outside its rule
    ├── ModelNotFound          a decoder or embedder cannot be resolved or read
    ├── UnsupportedModel       the architecture is not one the engine can run
    ├── DocumentError          one input document cannot be used (the others go on)
    ├── StoreError
    │   ├── StoreNotFound      no store at this path
    │   ├── StoreMismatch      store and model, compressor or embedder differ; names the field
    │   ├── StoreCorrupt       a file of the store is damaged; names the file
    │   ├── StoreLocked        another writer holds the store
    │   └── StoreFull          the disk is full; nothing was changed
    ├── SegmentUnavailable     one segment is missing or damaged; the others can be used
    ├── NotInStore             an id that the store does not hold
    ├── PromptTooLong          question, prefix and answer do not fit the decoder's window
    ├── AdapterError           an adapter is unknown, or was made for another decoder
    ├── DecoderUnavailable     a decoder that runs elsewhere cannot be reached, or refuses
    └── WrongProcess           opened before a fork and used after it

A message states the rule, the value received and, where it is known, the fix.
"""

__all__ = [
    "AdapterError",
    "ConfigError",
    "DecoderUnavailable",
    "DocumentError",
    "LLoCOError",
    "ModelNotFound",
    "NotInStore",
    "PromptTooLong",
    "SegmentUnavailable",
    "StoreCorrupt",
    "StoreError",
    "StoreFull",
    "StoreLocked",
    "StoreMismatch",
    "StoreNotFound",
    "UnsupportedModel",
    "WrongProcess",
]


class LLoCOError(Exception):
    """Base of all errors raised on purpose by the engine."""


class ConfigError(LLoCOError, ValueError):
    """A setting is outside its rule."""


class ModelNotFound(LLoCOError):
    """A decoder or embedder cannot be resolved or read."""


class UnsupportedModel(LLoCOError):
    """The model's architecture is not one the engine can run."""


class DocumentError(LLoCOError):
    """One input document cannot be used; the others go on."""


class StoreError(LLoCOError):
    """Base of the store's errors."""


class StoreNotFound(StoreError):
    """There is no store at this path."""


class StoreMismatch(StoreError):
    """Store and model, compressor or embedder differ; the message names the field."""


class StoreCorrupt(StoreError):
    """A file of the store is damaged; the message names the file."""


class StoreLocked(StoreError):
    """Another writer holds the store."""


class StoreFull(StoreError):
    """The disk is full; the store is as it was."""


class SegmentUnavailable(StoreError):
    """One segment is missing or damaged; the others can be used."""


class NotInStore(StoreError, KeyError):
    """An id that the store does not hold."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class PromptTooLong(LLoCOError, ValueError):
    """Question, prefix and answer do not fit the decoder's window."""


class AdapterError(LLoCOError):
    """An adapter is unknown, or was made for another decoder."""


class DecoderUnavailable(LLoCOError):
    """A decoder that runs elsewhere cannot be reached, or refuses."""


class WrongProcess(LLoCOError):
    """What was opened before a fork is used in the forked process."""
