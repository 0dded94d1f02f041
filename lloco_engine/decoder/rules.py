"""What a layer's attention does to its logits beyond scaling them: a softcap, a window of positions, a sink.

These are the decoder's own, found out when it is loaded (`lloco_engine.decoder.probe`), and hold for slots and live
tokens alike. Whoever reads or fits slots goes by them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

__all__ = ["PLAIN", "Rules", "Sees", "attend_by", "with_sink"]

# (positions of queries, positions of keys), int64 that broadcast -> bool: which keys a query may read
Sees = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_ROWS = 1024  # query rows whose logits are held at once


@dataclass(frozen=True, eq=False)
class Rules:
    """One layer's rules.

    softcap : logits become ``softcap * tanh(logit / softcap)``, or stay as they are (Gemma 2, arXiv 2408.00118)
    sinks   : (query heads,) a logit of each head that takes its share of attention and reads nothing (gpt-oss), or None
    sees    : for a layer that does not read all that lies before a token, which positions it does; None reads all
    """

    softcap: float | None = None
    sinks: torch.Tensor | None = None
    sees: Sees | None = None

    @property
    def plain(self) -> bool:
        """Whether attention is softmax of scaled products over all that lies before."""
        return self.softcap is None and self.sinks is None and self.sees is None

    def cap(self, logits: torch.Tensor) -> torch.Tensor:
        """Scaled logits as the softcap makes them; biases and masks come after it."""
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def hidden(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
        """Which keys must not be read, by positions that broadcast; None where the layer reads all before a token."""
        return None if self.sees is None else ~self.sees(queries, keys)


PLAIN = Rules()


def attend_by(
    rules: Rules, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, added: torch.Tensor, scale: float
) -> torch.Tensor:
    """Softmax attention by a layer's rules.

    Args:
        rules: softcap and sinks; windows are in ``added``.
        q: (B, H, G * T, D), the query heads of one KV head one after another.
        keys, values: (B, H, S, D).
        added: what is added to the capped logits, broadcasting to (B, H, G * T, S); -inf bars.
        scale: factor of the logits.

    Returns:
        (B, H, G * T, D) in the type of the values.
    """
    if rules.softcap is None:
        if rules.sinks is not None:  # a key of zeros, to whose logit the sink is added, and a value of zeros
            keys, values = (F.pad(part, (0, 0, 0, 1)) for part in (keys, values))
            added = added.expand(len(q), q.shape[1], q.shape[2], -1)
            sinks = _of_rows(rules.sinks, q).to(added.dtype).expand(len(q), -1, -1, -1)
            added = torch.cat((added, sinks), dim=-1)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=added, scale=scale)
    wells = None if rules.sinks is None else _of_rows(rules.sinks, q).expand(len(q), -1, -1, -1)
    added = added.expand(-1, -1, q.shape[2], -1)
    read = []
    for row in range(0, q.shape[2], _ROWS):
        some = slice(row, row + _ROWS)
        logits = rules.cap(torch.matmul(q[:, :, some], keys.transpose(-1, -2)).float() * scale) + added[:, :, some]
        if wells is not None:
            logits = torch.cat((logits, wells[:, :, some]), dim=-1)
        weights = torch.softmax(logits, dim=-1)[..., : keys.shape[2]].to(values.dtype)
        read.append(torch.matmul(weights, values))
    return torch.cat(read, dim=2)


def with_sink(rules: Rules, read: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What rows (B, H, R, D) read and the logarithm (B, H, R) of their partition sums, the sinks' share taken.

    H are KV heads and R their query heads' tokens, or H query heads and R tokens.
    """
    if rules.sinks is None:
        return read, lse
    sinks = _of_rows(rules.sinks, read)[..., 0]
    total = torch.logaddexp(lse, sinks)
    return read * torch.exp(lse - total).to(read.dtype)[..., None], total


def _of_rows(sinks: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(1, H, R, 1) each row's sink, for (query heads,) sinks and rows (B, H, R, D)."""
    heads = rows.shape[1]
    group = len(sinks) // heads
    return (
        sinks.float().view(1, heads, group, 1).expand(1, heads, group, rows.shape[2] // group).reshape(1, heads, -1, 1)
    )
