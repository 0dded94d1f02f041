"""Practice in reading, made of documents that have questions: facts sown into their text, and multiple choice.

Question-answer pairs teach a decoder what is asked about its documents, and seldom the two things that it misreads most
in compressed text: a name that stands there once, and which of several options the text supports. Both need no one to
write them: a fact about an invented place is put between two sentences and asked for, and a question's own answer is
put among the answers of others.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lloco_engine.atomic import open_file
from lloco_engine.config import Config
from lloco_engine.errors import ConfigError, LLoCOError
from lloco_engine.readers.records import Question, Record

__all__ = ["PracticeConfig", "practise", "write"]

_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_FACT_ID, _CHOICE_ID = "-fact-", "-choice"  # in the ids of what is made
_LONGEST_OPTION = 240  # characters
_OPTIONS = 4
_PLACES = (
    ("Al", "Bran", "Cas", "Der", "El", "Fal", "Grim", "Hart", "Ister", "Jar", "Lin", "Mor", "Nes", "Ost", "Pol", "Rav"),
    ("a", "e", "i", "o", "u", "an", "er", "in", "or"),
    ("bach", "by", "combe", "den", "fell", "holm", "ker", "ley", "minster", "more", "ness", "rode", "stow", "thorpe"),
)
_FIRST = (
    *("Ada", "Albin", "Beatrix", "Caspar", "Cecily", "Conrad", "Dinah", "Edgar", "Elsa", "Felix", "Flora", "Gideon"),
    *("Hanna", "Hugo", "Ida", "Ivor", "Jonas", "Judith", "Kaspar", "Lena", "Lucas", "Mabel", "Martin", "Nadia"),
    *("Nils", "Olga", "Otto", "Paula", "Quentin", "Rosa", "Rufus", "Sabine", "Simon", "Tilda", "Ulrich", "Vera"),
)
_LAST = (
    *("Abbott", "Ashdown", "Barlow", "Birch", "Carver", "Collier", "Dacre", "Drummond", "Ekberg", "Farrow", "Fenner"),
    *("Garland", "Hale", "Hobbs", "Ingram", "Jessop", "Kerr", "Langley", "Lovell", "Maddox", "Mercer", "Norris"),
    *("Oakes", "Paget", "Quayle", "Rudd", "Sayer", "Selby", "Tarrant", "Thorne", "Usher", "Vickers", "Wadham", "Yates"),
)
_GOODS = (
    *("amber", "barley", "beeswax", "brass", "canvas", "cedar", "charcoal", "cinnamon", "copper", "cork", "felt"),
    *("flax", "glass", "granite", "hemp", "honey", "indigo", "ivory", "jasper", "lavender", "leather", "linen", "lime"),
    *(
        "mahogany",
        "marble",
        "nutmeg",
        "oats",
        "paper",
        "pewter",
        "quartz",
        "resin",
        "salt",
        "silk",
        "slate",
        "tar",
        "wool",
    ),
)
_ANIMALS = ("badger", "bittern", "crane", "falcon", "goat", "heron", "lynx", "magpie", "otter", "raven", "stag", "swan")
_COLOURS = (
    *("amber", "azure", "beige", "bronze", "brown", "crimson"),
    *("green", "grey", "indigo", "maroon", "violet", "white"),
)
_CRAFTS = (
    *("archery", "baskets", "bells", "cartography", "compasses", "coins", "falconry", "fishing", "glaciers", "harps"),
    *("lace", "lanterns", "locks", "maps", "mining", "puppets", "railways", "rowing", "sundials", "typewriters"),
)
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)

_WORDS = {"goods": _GOODS, "animal": _ANIMALS, "colour": _COLOURS, "craft": _CRAFTS}

# what is sown, what is asked, and the kind of the answer
_FACTS = (
    ("The mayor of {place} is {answer}.", "Who is the mayor of {place}?", "person"),
    ("{answer} teaches the violin in {place}.", "Who teaches the violin in {place}?", "person"),
    ("The doctor of {place} is a certain {answer}.", "What is the doctor of {place} called?", "person"),
    ("In {place} the post is carried by {answer}.", "Who carries the post in {place}?", "person"),
    ("The mill at {place} belongs to {answer}.", "To whom does the mill at {place} belong?", "person"),
    ("{answer} won the regatta of {place} that year.", "Who won the regatta of {place}?", "person"),
    ("The harbour of {place} ships mostly {answer}.", "What does the harbour of {place} mostly ship?", "goods"),
    ("The market of {place} is known for its {answer}.", "What is the market of {place} known for?", "goods"),
    (
        "The doors of the town hall of {place} are made of {answer}.",
        "What are the town hall's doors in {place} made of?",
        "goods",
    ),
    ("In {place} the tithe was paid in {answer}.", "In what was the tithe paid in {place}?", "goods"),
    ("A {answer} is on the coat of arms of {place}.", "Which animal is on the coat of arms of {place}?", "animal"),
    ("The inn of {place} is named after a {answer}.", "After which animal is the inn of {place} named?", "animal"),
    ("The fair of {place} is held on {answer}.", "When is the fair of {place} held?", "day"),
    ("The school of {place} was opened on {answer}.", "On which day was the school of {place} opened?", "day"),
    ("There are {answer} wells in {place}.", "How many wells are there in {place}?", "number"),
    ("The tower of {place} has {answer} steps.", "How many steps has the tower of {place}?", "number"),
    ("The gardener at {place} is named {answer}.", "What is the gardener at {place} named?", "person"),
    ("At {place} the songs were written down by {answer}.", "Who wrote down the songs at {place}?", "person"),
    ("The {answer} of {place} is sold as far away as the coast.", "What of {place} is sold far away?", "goods"),
    (
        "The smithy of {place} is best known for its {answer} work.",
        "For what kind of work is the smithy of {place} best known?",
        "goods",
    ),
    ("The ferry at {place} has {answer} sails.", "What colour are the sails of the ferry at {place}?", "colour"),
    (
        "The gate of {place} is {answer} since the repairs.",
        "What colour is the gate of {place} since the repairs?",
        "colour",
    ),
    ("The pupils of {place} wear {answer} coats.", "What colour are the coats of the pupils of {place}?", "colour"),
    (
        "The library of {place} collects books about {answer}.",
        "What does the library of {place} collect books about?",
        "craft",
    ),
    ("A club in {place} is given over to {answer}.", "What is the club in {place} given over to?", "craft"),
    ("The exhibition at {place} was all about {answer}.", "What was the exhibition at {place} about?", "craft"),
    ("The road from {place} leads to {answer}.", "Where does the road from {place} lead?", "place"),
    ("The sister town of {place} is {answer}.", "What is the sister town of {place}?", "place"),
)


@dataclass(frozen=True)
class PracticeConfig(Config):
    """How practice is made.

    Args:
        fact_every: characters of text to a sown fact; a shorter text gets one. 0 sows none.
        choices: share of the questions that become multiple choice.
        seed: of everything that is drawn.
    """

    fact_every: int = 1500
    choices: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.fact_every < 0:
            raise ConfigError(f"fact_every must be at least 0 characters, not {self.fact_every}")
        if not 0 <= self.choices <= 1:
            raise ConfigError(f"choices must be from 0 to 1, not {self.choices}")


def practise(records: Sequence[Record], config: PracticeConfig | None = None) -> Iterator[Record]:
    """The documents, with facts sown into them and some of their questions as multiple choice.

    Equal records and settings make equal practice; a document's own part does not depend on how many follow it, but for
    the answers that stand beside its own.

    Args:
        records: documents with questions.
        config: settings.
    """
    config = PracticeConfig() if config is None else config
    answers = [q.answers[0] for record in records for q in record.questions if len(q.answers[0]) <= _LONGEST_OPTION]
    for number, record in enumerate(records):
        chance = random.Random(f"{config.seed} {number} {record.doc_id}")
        sown, facts = _sow(record.text, config.fact_every, chance)
        own = [question.answers[0] for question in record.questions]
        asked = [
            _as_choice(question, own, answers, chance) if chance.random() < config.choices else question
            for question in record.questions
        ]
        named = [replace(fact, id=f"{record.doc_id}{_FACT_ID}{n}") for n, fact in enumerate(facts)]
        yield replace(record, text=sown, questions=(*asked, *named))


def write(path: Path, records: Iterable[Record]) -> dict[str, int]:
    """Write records as a file that `read_records` reads, wholly or not at all.

    Returns:
        how many documents and questions there are, and of these ``facts`` and ``choices``.

    Raises:
        LLoCOError: the file cannot be written.
    """
    report = dict.fromkeys(("documents", "questions", "facts", "choices"), 0)
    try:
        with open_file(path) as lines:
            for record in records:
                lines.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
                report["documents"] += 1
                report["questions"] += len(record.questions)
                report["facts"] += sum(_FACT_ID in question.id for question in record.questions)
                report["choices"] += sum(question.id.endswith(_CHOICE_ID) for question in record.questions)
    except OSError as error:
        raise LLoCOError(f"the practice could not be written to {path}: {error.strerror}") from error
    return report


def _sow(text: str, every: int, chance: random.Random) -> tuple[str, list[Question]]:
    """The text with facts between its sentences, about as many characters apart, and their questions."""
    if not every:
        return text, []
    ends = [0, *(match.end() for match in _SENTENCE.finditer(text)), len(text)]
    count = max(1, round(len(text) / every))
    chosen = sorted(chance.choices(ends, k=count))
    parts: list[str] = []
    questions: list[Question] = []
    begin = 0
    for at in chosen:
        sentence, question = _fact(chance)
        before = text[begin:at]
        parts += [before, "" if not before or before[-1].isspace() else " ", sentence, " "]
        questions.append(question)
        begin = at
    return "".join([*parts, text[begin:]]).rstrip() + text[len(text.rstrip()) :], questions


def _fact(chance: random.Random) -> tuple[str, Question]:
    sentence, question, kind = chance.choice(_FACTS)
    place, answer = _place(chance), _answer(kind, chance)
    return sentence.format(place=place, answer=answer), Question(question.format(place=place), (answer,))


def _place(chance: random.Random) -> str:
    return "".join(map(chance.choice, _PLACES))


def _answer(kind: str, chance: random.Random) -> str:
    match kind:
        case "person":
            return f"{chance.choice(_FIRST)} {chance.choice(_LAST)}"
        case "day":
            return f"{chance.randint(1, 28)} {chance.choice(_MONTHS)}"
        case "number":
            return str(chance.randint(3, 480))
        case "place":
            return _place(chance)
    return chance.choice(_WORDS[kind])


def _as_choice(question: Question, own: Sequence[str], others: Sequence[str], chance: random.Random) -> Question:
    """The question with its answer among three others, as an option's text or its letter; as it was if too few fit.

    Half of the others are the document's own answers, where it has so many: what merely stands in the text is not
    right yet.
    """
    gold = question.answers[0].strip()
    if not gold or len(gold) > _LONGEST_OPTION or "\n" in gold:
        return question
    near = [answer.strip() for answer in chance.sample(own, len(own))]
    far = [answer.strip() for answer in chance.sample(others, min(len(others), 16))]
    options = [gold]
    for pool, most in ((near, _OPTIONS // 2), (far, _OPTIONS - 1), (near, _OPTIONS - 1)):
        for answer in pool:
            if len(options) <= most and _differs(answer, options):
                options.append(answer)
    if len(options) < _OPTIONS:
        return question
    chance.shuffle(options)
    at = options.index(gold)
    letter, made = chr(ord("A") + at), question.id + _CHOICE_ID
    if chance.random() < 0.5:
        lines = "".join(f"\n ({chr(ord('A') + n)}) {option} " for n, option in enumerate(options))
        return replace(question, question=f"{question.question}\n{lines}", answers=(f"({letter}) {gold}",), id=made)
    lines = "".join(f"\n{chr(ord('A') + n)}. {option}" for n, option in enumerate(options))
    return replace(question, question=f"{question.question}{lines}", answers=(letter,), id=made)


def _differs(answer: str, options: Sequence[str]) -> bool:
    """Whether an answer may stand beside others: on one line, and none of them within another."""
    plain = answer.lower().rstrip(".")
    if not plain or len(answer) > _LONGEST_OPTION or "\n" in answer:
        return False
    return not any(plain in (other := option.lower().rstrip(".")) or other in plain for option in options)
