"""What every text that comes in must be, before anything reads it, hashes it or looks it up."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lloco_engine.errors import ConfigError

__all__ = ["not_unicode", "require_unicode"]


def require_unicode(**values: Any) -> None:
    """Refuse text with a lone surrogate: half a character, of a cut emoji or of bytes that were no UTF-8.

    Args:
        values: by what each is called: a text, or a mapping or collection of such, at any depth.

    Raises:
        ConfigError: names the first that is not Unicode.
    """
    for name, value in values.items():
        for text in _texts(value):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise not_unicode(error, name) from error


def not_unicode(error: UnicodeEncodeError, name: str = "text") -> ConfigError:
    """What is wrong with a text that could not be encoded."""
    given = str(error.object)
    shown = ascii(given[max(0, error.start - 20) : error.start + 20])
    return ConfigError(
        f"{name} must be valid Unicode, and character {error.start} of {shown} is a lone surrogate, half a character; "
        "decode bytes as what they are, or replace it (text.encode('utf-8', 'replace').decode())"
    )


def _texts(value: Any) -> Any:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, Collection) and not isinstance(value, bytes):
        for inner in value:
            yield from _texts(inner)
