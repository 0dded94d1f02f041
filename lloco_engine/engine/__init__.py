"""The engine: one door to a store and to the models that go with it.

`facade` is the door, and has all that users call. Behind it `resources` opens what an engine works with, `ingest` and
`refining`, parts of their own, learn from documents, and `answering` takes a question to the decoder.
"""

from lloco_engine.engine.facade import Engine
from lloco_engine.ingest import Progress
from lloco_engine.streaming import AnswerStream, AsyncAnswerStream

__all__ = ["AnswerStream", "AsyncAnswerStream", "Engine", "Progress"]
