"""Compressors: a chunk's token ids in, a segment out. One of your own derives from `Compressor` or `ScorerCompressor`.

::

    from lloco_engine import Observed, ScorerCompressor, register

    @register
    class KeyNorm(ScorerCompressor):
        name = "key_norm"

        def score(self, observed: Observed):
            return -observed.keys[:, observed.chunk].norm(dim=-1)
"""
