"""An answer's tokens as text that can be shown: ended by stop strings, without thoughts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lloco_engine.decoder.detokenizing import Detokenizer
from lloco_engine.decoder.thoughts import Thoughts

__all__ = ["TextStream"]

_MARKER = 64  # tokens that the longest marker of thoughts can be written in


class TextStream:
    """Token ids in, printable text out; holds back half a character and anything that may become a stop string.

    Thoughts are no text: they are kept apart, and ended where they take more tokens than they may.

    Args:
        tokenizer: the decoder's.
        stop: texts that end the answer.
        thoughts: the decoder's markers of thoughts, or None.
        budget: tokens that thoughts may take.
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str] = (), thoughts: Thoughts | None = None, budget: int = 0
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._thoughts, self._budget = thoughts, budget
        self._awaited = (*self._stop, thoughts.markers.begin) if thoughts is not None else self._stop
        self._longest = max(map(len, self._awaited), default=0)
        self.stopped = False
        self.inside = thoughts is not None and thoughts.opened
        self.tokens = 0
        self.thought_tokens = 0
        self.forced = 0  # tokens that were not the decoder's choice
        self._thought: list[int] = []
        self._ended: list[str] = []  # thoughts
        self._pending: list[int] = []  # tokens that a marker may begin with
        self._decoded = Detokenizer(tokenizer)
        self._held = ""  # whole text that is not shown yet
        self._said = False  # whether anything but white space was shown

    def push(self, token: int) -> str:
        """Add one token; returns the text that can be shown now: none after a stop string."""
        if self.stopped:
            return ""
        self.tokens += 1
        if self._thoughts is not None and self.inside:
            return self._think(token, self._thoughts)
        if self._thoughts is not None and self._thoughts.begin_is_token:
            return self._match(token, self._thoughts)
        return self._write(self._decoded.push(token))

    def finish(self) -> str:
        """The text held back, once no token follows."""
        rest = self._held + "".join(map(self._decoded.push, self._pending)) + self._decoded.rest()
        self._pending = []
        self._decoded, self._held = Detokenizer(self._tokenizer), ""
        return self._show(rest)

    def must_follow(self) -> int | None:
        """The token that must come next, as thoughts have taken all that they may; None where the decoder chooses."""
        if self._thoughts is None or not self.inside or self.thought_tokens - self.forced < self._budget:
            return None
        self.forced += 1
        return self._thoughts.close[min(self.forced, len(self._thoughts.close)) - 1]

    def free(self) -> int | None:
        """Tokens that thoughts may still take; None outside of them."""
        return max(0, self._budget - self.thought_tokens) if self.inside else None

    def is_full(self, most: int) -> bool:
        """Whether the answer has its ``most`` tokens, those of thoughts not counted."""
        if self._thoughts is None:
            return self.tokens >= most
        text = self._held + self._decoded.rest()
        if not self._said and self._thoughts.markers.begin.startswith(text.strip()):
            most += max(len(self._thoughts.begin), len(self._thoughts.head))  # what may be the marker of either
        lost = self.forced > len(self._thoughts.close)
        return lost or (not self.inside and self.tokens - self.thought_tokens >= most)

    @property
    def reasoning(self) -> str:
        """The thoughts so far."""
        going_on = self._thought_text(0) if self.inside else ""
        return "\n\n".join(text for one in (*self._ended, going_on) if (text := one.strip()))

    def _match(self, token: int, thoughts: Thoughts) -> str:
        """Add a token where markers are tokens: what may become one is held back, and is no text when it is whole."""
        self._pending.append(token)
        shown = ""
        while self._pending:
            size = len(self._pending)
            if self._pending == thoughts.begin:
                self._pending = []
                return shown + self._begin(self._held + self._decoded.rest(), size)
            if self._pending == thoughts.head and not self._said:
                self._pending = []
                self.tokens -= size
            elif self._pending in (thoughts.begin[:size], thoughts.head[:size]):
                break
            else:
                shown += self._write(self._decoded.push(self._pending.pop(0)))
                if self.stopped or self.inside:
                    later, self._pending = self._pending, []
                    return shown + "".join(self._think(one, thoughts) for one in later if self.inside)
        return shown

    def _write(self, new: str) -> str:
        """Add text that is whole; returns what can be shown of all that is held back."""
        text = self._held + new
        if self._ended and not self._said:
            text = text.lstrip()
        # what was shown is the beginning of none of them
        if found := [at for stop in self._stop if (at := text.find(stop)) >= 0]:
            self.stopped, self._held, self._decoded = True, "", Detokenizer(self._tokenizer)
            return self._show(text[: min(found)])
        if self._thoughts is not None and (at := text.find(self._thoughts.markers.begin)) >= 0:
            return self._begin(text[:at], len(self._thoughts.begin))
        end = len(text) - self._awaiting(text)
        self._held = text[end:]
        return self._show(text[:end])

    def _show(self, text: str) -> str:
        self._said = self._said or bool(text.strip())
        return text

    def _awaiting(self, text: str) -> int:
        """Characters at the end of a text that may become what is awaited."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if any(awaited.startswith(text[-size:]) for awaited in self._awaited):
                return size
        return 0

    def _begin(self, text: str, marker: int) -> str:
        """Thoughts begin after this text, by a marker of so many tokens."""
        self.inside, self._thought, self._held = True, [], ""
        self._decoded = Detokenizer(self._tokenizer)
        self.thought_tokens += marker
        return self._show(text)

    def _think(self, token: int, thoughts: Thoughts) -> str:
        self.thought_tokens += 1
        self._thought.append(token)
        rest, size = "", len(thoughts.close)
        if thoughts.end_is_token:
            if self._thought[-size:] != thoughts.close:
                return ""
            del self._thought[-size:]
        else:
            _, found, rest = self._thought_text(-_MARKER).partition(thoughts.markers.end)
            if not found:
                return ""
        self._ended.append(self._thought_text(0).partition(thoughts.markers.end)[0])
        self.inside = False
        return self._write(rest)

    def _thought_text(self, begin: int) -> str:
        return str(self._tokenizer.decode(self._thought[begin:], skip_special_tokens=True))
