"""A deterministic, templated instruction corpus that needs no download and no licence.

Every category is a grammar: tables of slot values whose product enumerates all prompts, prompt
patterns, an answer pattern and a follow-up turn. Patterns use two marks: ``<a|b|c>`` is one of the
alternatives (``<adj>`` one of that pool of words) and ``{slot}`` a slot value, which may itself
name slots. Earlier alternatives are likelier than later ones, so that the text has a clear mode
at every fork and yet a real entropy.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

SPLITS = ("train", "eval", "bench")
CATEGORIES = ("stories", "arithmetic", "howto", "objects", "python")

_SECOND_TURN_SHARE = 0.3
_SLOT = re.compile(r"\{(\w+)\}")
_CHOICE = re.compile(r"<([^<>]*)>")
_POOLS = {
    "adj": "quiet warm bright gentle wide cold soft strange merry tidy lovely proud golden simple "
    "famous dusty lively plain noble hidden clever rare fresh funny deep calm grand modern",
    "adverb": "slowly quickly carefully calmly suddenly happily bravely quietly proudly gladly "
    "often gently kindly simply boldly always neatly wisely safely surely",
    "friend": "Nora Leo Mia Paul Sara Tom Ruth Karl Jane Hugo Emma Oscar Lena Fred Julia Sam",
    "digit": "1 2 3 4 5 6 7 8 9",
}


class _Grammar(NamedTuple):
    # Column names to rows: one word a row where there is one column on one line, else one line a
    # row with its cells between " / ".
    tables: dict[str, str]
    prompts: tuple[str, ...]
    answer: str
    followup: tuple[str, str]


_STORIES = _Grammar(
    tables={
        "name": "Anna Ben Clara David Ella Felix Grace Henry Iris Jonas Lily Max",
        "animal": "fox bear rabbit mouse turtle hedgehog badger squirrel duck goat",
        "thing danger": """
lost key / a door that would not open
torn map / a path that went in circles
paper boat / a river that ran too wild
red kite / a wind that never stopped
wooden flute / a silence that felt too long
tiny seed / a summer without any rain""",
        "place helper": """
forest / an old owl
village / a kind baker
valley / a quiet shepherd
harbour / a cheerful sailor
garden / a patient snail
mountain / a wise hermit""",
    },
    prompts=(
        "Write a short story about {name} the {animal} and a {thing} in the {place}.",
        "Tell me a story about a {animal} called {name} who finds a {thing} in the {place}.",
        "Please write a tale set in the {place}, with a {animal} named {name} and a {thing}.",
    ),
    answer=(
        "<Once upon a time|Long ago|One bright morning|One cold evening>, a "
        "<small|young|curious|brave|shy> <and|but> <adj> {animal} named {name} <adverb> <lived "
        "in|walked through|came to> the {place}. <One day|Near the old bridge|Under a tall "
        "tree|After breakfast>, {name} <adverb> <found|discovered|stumbled upon> a {thing} "
        "<lying in|hidden in|half buried in> the <adj> <grass|leaves|sand>. <Nobody knew where "
        "it came from|It looked very old|It seemed to be waiting for someone>. <But "
        "soon|Then|That same day> {name} <had to face|met|was surprised by> {danger}. "
        "<Luckily,|Just in time,|After a while,> {helper} <adverb> <came to help|offered some "
        "good advice|showed the {animal} what to do>, and <together they|the two of them|side by "
        "side they> <used the {thing} to set things right|solved the problem|found a way>. "
        "<friend> and <friend> <cheered|sang|danced> for a <adj> hour. <From that day on|In the "
        "end|When night fell>, {name} <kept the {thing} close|was never lonely again|slept well "
        "and dreamed of the {place}|told everyone in the {place} about the {thing}>."
    ),
    followup=(
        "What is the moral of the story?",
        "<The moral is that|The story teaches us that|I would say that> <asking for help is a "
        "kind of courage|small things can matter a lot|friends make hard days easier>. {name} "
        "the <adj> {animal} <could not|was not able to> <face|deal with> {danger} alone, but "
        "<adverb>, <with the help of|thanks to> {helper}, the {thing} became a <adj> "
        "<treasure|gift|sign>, and <everyone|every creature> in the {place} <was happy|felt "
        "safe> again.",
    ),
)
_ARITHMETIC = _Grammar(
    tables={
        "name": "Omar Paula Quinn Rosa Simon Tara Umar Vera Walter Yara",
        "item": "apples marbles stickers pencils coins books shells cards",
        "event action equation result": """
buys {b} more / add {b} to {a} / {a} + {b} = {sum} / {sum}
gives {b} of them to a friend / subtract {b} from {a} / {a} - {b} = {diff} / {diff}
gets {b} times as many / multiply {a} by {b} / {a} * {b} = {prod} / {prod}
finds {b} more but loses 1 / add {b} to {a} and take away 1 / {a} + {b} - 1 = {net} / {net}""",
        "a": "8 10 12 14 15 18",
        "b": "2 3 4 5 6",
    },
    prompts=(
        "{name} has {a} {item} and {event}. How many {item} does {name} have now?",
        "At first {name} has {a} {item}. Then {name} {event}. How many {item} are there now?",
        "Solve this problem step by step: {name} has {a} {item} and {event}. How many now?",
    ),
    answer=(
        "<Let us|We can|I will> <adverb> <solve this step by step|work this out|think about it>. "
        "<First,|To begin,|At the start,> {name} has {a} <adj> {item}. <Next,|Then|After that,> "
        "{name} <adverb> {event}, so we <need to|have to|must|should> {action}. <This gives|That "
        "means|In numbers, this is|We get> {equation}. <friend> can <adverb> <check the "
        "result|make sure of it|test this> <with real {item}|by going backwards|on a sheet of "
        "paper>, and so can <friend>. <It is a|This was a|What a> <adj> "
        "<problem|question|exercise>! <So the answer is {result}|Therefore, {name} now has "
        "{result} {item}|The answer is {result} {item}|In total, {name} ends up with {result} "
        "{item}>."
    ),
    followup=(
        "Can you explain why?",
        "<Of course.|Sure.|Yes.> The number of <adj> {item} changes because {name} <adverb> "
        "{event}. <Before that|At first> there <were|are> {a} {item}, and <the change tells us "
        "to|for this reason we> {action}. <The only sum we need|All we have to write down> is "
        "{equation}, <which is why|and so> the <final|correct> answer is {result} {item}. "
        "<friend> <thinks so|agrees> too.",
    ),
)
_HOWTO = _Grammar(
    tables={
        "task tool first second third": """
clean a window / a soft cloth / wipe off the dust / spread soapy water / dry the glass
plant a tree / a sharp spade / dig a wide hole / set the roots inside / press the soil
bake bread / a large bowl / mix flour and water / let the dough rest / bake it until golden
fix a flat tyre / a tyre lever / take off the wheel / patch the hole / pump up the tyre again
paint a wall / a wide roller / cover the floor / paint the corners / roll on two thin coats
make tea / a clean kettle / boil fresh water / pour it over the leaves / wait four minutes
pack a suitcase / a written list / lay out the clothes / roll the shirts / add the shoes
wash a dog / a gentle shampoo / brush the coat / wet the fur / rinse well and dry with a towel
sharpen a knife / a flat stone / wet the stone / slide the blade slowly / test the edge on paper
sew on a button / a thin needle / thread the needle / stitch through every hole / tie a knot
cook rice / a heavy pot / rinse the grains / simmer them in water / let the pot stand
build a campfire / a box of matches / clear some bare ground / stack dry twigs / light them""",
        "person reason": """
a child / safety matters most
a student / time is short
a beginner / every step is new
a busy parent / there is so much else to do
an old friend / good company helps
my neighbour / we want to do it well
my brother / patience is not easy
a tourist / everything is strange at first""",
        "time": "morning afternoon evening weekend holiday",
        "budget": """
on a small budget
with simple tools
in under an hour
without making a mess
for the first time
on a rainy day
in the right order
without any help""",
    },
    prompts=(
        "How can {person} {task} {budget} this {time}?",
        "Give me a list of steps for {person} to {task} {budget} in the {time}.",
        "Explain to {person} how to {task} {budget} on a free {time}.",
    ),
    answer=(
        "<Here is a simple way to|Here are the steps to|This is how to|Follow these steps to> "
        "{task} {budget}:\n\n1. <Get|Find|Prepare> {tool} <and a free {time}|and some time this "
        "{time}|before the {time} begins>.\n2. <First|To begin|At first>, <adverb> {first}.\n3. "
        "<Then|Next|After that>, <adverb> {second}.\n4. <Finally|At last|When that is done>, "
        "<adverb> {third}.\n\nA <adj> <mood|plan|place> and some <adj> <music|light|company> "
        "<help a lot|make it easier>, <because|since> {reason}. <If something goes wrong|If you "
        "are not sure|If the result is not perfect>, <adverb> <go back one step|try once "
        "more|start again>, or ask <friend> for <adj> advice. <With a little practice|After two "
        "or three tries|Before long>, {person} <can do it easily|will enjoy it|will know every "
        "step by heart>."
    ),
    followup=(
        "Which step is the hardest?",
        "<I think that|Most people say that|Usually> the <second|third> step <is the "
        "hardest|needs the most care>: <adverb> {second}. Keep {tool} <close at hand|ready the "
        "whole time>, and <do not forget|remember> that {reason}. <Once you have done it "
        "well|After that>, <all that is left|the last step> is <easy|quick>: {third}. <A calm "
        "{time} helps too, and so does|What also helps is> a <adj> <friend|cup of tea|song>.",
    ),
)
_OBJECTS = _Grammar(
    tables={
        "object part use place": """
kettle / handle / boil water / kitchen
chair / seat / rest after work / dining room
lamp / shade / read at night / bedroom
clock / face / know the time / hallway
box / lid / store letters / attic
bench / back / sit in the sun / park
table / top / share a meal / living room
whistle / mouthpiece / call the players / stadium
shelf / edge / keep books in order / library
bucket / rim / carry water / stable
mirror / frame / see your face / bathroom
spoon / handle / stir soup / kitchen
ladder / step / reach high places / barn""",
        "color": "red blue green yellow white black brown grey",
        "material feel": """
wooden / warm and smooth
steel / cool and heavy
copper / bright and solid
plastic / light and simple
bamboo / light but strong
silver / fine and polished
leather / soft and worn
stone / rough and cold""",
        "size": "small large round narrow tall folding",
    },
    prompts=(
        "Describe a {size} {color} {material} {object}.",
        "What is a {size} {color} {material} {object} good for?",
        "Write a description of a {color} {object}. It is {size} and {material}.",
    ),
    answer=(
        "<A {size} {material} {object}|This {size} {object}|The {color} {object}> is a <adj> "
        "<thing|item|object> <that you often see in|at home in|usually found in> the {place}. "
        "<Its {part} is|The {part} is|You will notice that the {part} is> <adj> and {color}, and "
        "<the {material} surface feels|in your hand it feels|to the touch it is> {feel}. "
        "<People|Most of us|Many families> <adverb> use it to {use}, <though some|but a few "
        "people|and some> <adverb> keep it <for guests|only because it is beautiful|as a present "
        "for their children>. <Because it is {size}|Thanks to its shape|As it is {material}>, it "
        "<fits almost anywhere|is easy to recognise|lasts for many years>. <friend> and <friend> "
        "each have a <adj> one. <To keep it clean|To care for it|Now and then>, <adverb> <wipe "
        "the {part} with a damp cloth|brush off the dust|rub the {part} with a little oil>. <A "
        "good {object} is worth its price|With some care it stays {color}|It makes any {place} a "
        "nicer place>."
    ),
    followup=(
        "Where should I put it?",
        "<The best place is|I would put it in|It belongs in> the <adj> {place}, <because|since> "
        "that is where <you want to|people like to> {use}. <Keep|Place> the {object} <away from "
        "strong sun|in a dry corner|near the window>, so that the {color} {part} <adverb> "
        "<keeps its shine|stays bright>. <A {material} {object}|Something {size}> also looks "
        "<adj> <on its own|beside other {material} things>, and <it is easy to move|you can "
        "always try another spot>.",
    ),
)
_PYTHON = _Grammar(
    tables={
        "goal verb expression": """
counts the {noun} greater than {n} / count / sum(1 for x in {noun} if x > {n})
keeps the {noun} greater than {n} / keep / [x for x in {noun} if x > {n}]
adds {n} to all {noun} / raise / [x + {n} for x in {noun}]
multiplies all {noun} by {n} / scale / [x * {n} for x in {noun}]
returns the first {n} {noun} / first / {noun}[:{n}]
returns the last {n} {noun} / last / {noun}[-{n}:]
returns the {n} largest {noun} / largest / sorted({noun})[-{n}:]
returns the {n} smallest {noun} / smallest / sorted({noun})[:{n}]
sums the {noun} divisible by {n} / sum / sum(x for x in {noun} if x % {n} == 0)
checks whether all {noun} reach {n} / check / all(x >= {n} for x in {noun})""",
        "noun": "numbers prices ages scores weights heights lengths grades points times",
        "n": "2 3 4 5 6 7 8 9 10 12 15 20",
        "style note": """
clear / every name says what it means
small / there is nothing to import
simple / a beginner can read it
pure / the list itself is not changed""",
    },
    prompts=(
        "Write a {style} Python function that {goal}.",
        "Show me a {style} function in Python which {goal}.",
        "I need a {style} Python function. It {goal}. Can you write it?",
    ),
    answer=(
        "<Here is a|This is a|I wrote a> <adj> function that {goal}:\n\n```python\ndef "
        '{verb}_{noun}({noun}):\n    <"""Return the result for a list of {noun}."""|"""Work on a '
        'list of {noun}."""|# The {noun} are given as a list.>\n    <return {expression}|result '
        "= {expression}\n    return result>\n```\n\n<It takes|The function takes|It needs> a "
        "list of {noun} and <adverb> <walks through it once|looks at every value|does the work "
        "in one step>. <I like that|The good thing is that|Note that> {note}. <You can call it "
        "with|Try it with|For example, call it with> `{verb}_{noun}([<digit>, <digit>, "
        "<digit>])` <to see how it works|and print the result|in your own program>. <If the list "
        "is empty|When there are no {noun}>, it <adverb> <works as well|goes on without an "
        "error>. <friend> <uses it|tested it|asked for it> <in|for> a <adj> "
        "<project|game|lesson>."
    ),
    followup=(
        "Can you explain the code?",
        "<Sure|Of course|Yes>. The <adj> function `{verb}_{noun}` <takes one argument|has a "
        "single parameter>, the list of {noun}. <The important part|The heart of it> is "
        "`{expression}`, <which does all the work|and the rest is only a frame around it>. <In "
        "plain words|In other words>, it <adverb> {goal}. <It is {style}|I kept it {style}>, so "
        "{note}, and <friend> <can change the number {n} later|can easily test it>.",
    ),
)
_GRAMMARS = dict(zip(CATEGORIES, (_STORIES, _ARITHMETIC, _HOWTO, _OBJECTS, _PYTHON), strict=True))


def _rng(*parts: object) -> random.Random:
    return random.Random("\n".join(map(str, parts)))


def _pick(options: Sequence[Any], rng: random.Random) -> Any:
    # random() alone is promised to stay the same across Python versions; the square favours the
    # earlier alternatives.
    return options[int(len(options) * rng.random() ** 2)]


def _alternatives(mark: str) -> list[str]:
    return _POOLS[mark].split() if mark in _POOLS else mark.split("|")


def _fill(pattern: str, slots: dict[str, str], rng: random.Random) -> str:
    # Alternatives first: slot values may hold a bare ">".
    text = _CHOICE.sub(lambda match: _pick(_alternatives(match[1]), rng), pattern)
    while _SLOT.search(text):
        text = _SLOT.sub(lambda match: slots[match[1]], text)
    return text


def _rows(columns: str, table: str) -> list[dict[str, str]]:
    names = columns.split()
    lines = table.strip().split("\n") if "\n" in table else table.split()
    return [dict(zip(names, line.split(" / "), strict=True)) for line in lines]


def _with_sums(slots: dict[str, str]) -> dict[str, str]:
    if "a" not in slots:
        return slots
    a, b = int(slots["a"]), int(slots["b"])
    results = {"sum": a + b, "diff": a - b, "prod": a * b, "net": a + b - 1}
    return slots | {name: str(value) for name, value in results.items()}


def split_of(prompt: str) -> str:
    """The one split that a first user text belongs to: about 80/10/10 of all texts."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 10
    return "train" if bucket < 8 else SPLITS[bucket - 7]


@cache
def _prompts(category: str) -> dict[str, dict[str, str]]:
    """Every distinct prompt of the category, with its slot values."""
    grammar = _GRAMMARS[category]
    prompts: dict[str, dict[str, str]] = {}
    for rows in itertools.product(*(_rows(*table) for table in grammar.tables.items())):
        slots = _with_sums({name: cell for row in rows for name, cell in row.items()})
        rng = _rng(category, *slots.values())
        # Uniform here: the prompts are given, so their entropy costs the model nothing.
        pattern = grammar.prompts[int(len(grammar.prompts) * rng.random())]
        prompts.setdefault(_fill(pattern, slots, rng), slots)
    return prompts


def _ranked(split: str, category: str, seed: int) -> list[str]:
    pool = [prompt for prompt in _prompts(category) if split_of(prompt) == split]
    return sorted(pool, key=lambda prompt: hashlib.sha256(f"{seed}\n{prompt}".encode()).digest())


def _conversation(category: str, prompt: str, seed: int) -> dict[str, Any]:
    grammar, slots, rng = _GRAMMARS[category], _prompts(category)[prompt], _rng(seed, prompt)
    turns = [(prompt, grammar.answer)]
    if rng.random() < _SECOND_TURN_SHARE:
        turns.append(grammar.followup)
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": _fill(question, slots, rng)})
        messages.append({"role": "assistant", "content": _fill(answer, slots, rng)})
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:16]
    return {"id": f"synthetic-{category}-{digest}", "category": category, "conversations": messages}


def generate(
    split: str, count: int, seed: int = 0, category: str | None = None
) -> list[dict[str, Any]]:
    """Return `count` conversations of a split, with distinct first user texts.

    A conversation is ``{"id", "category", "conversations"}``, the last a list of one or two
    user/assistant pairs of ``{"role", "content"}``. The id follows from the first user text, and
    so does the split, so no text is in two splits, whatever the seeds. The seed decides the order
    and the wording of the answers; a smaller count gives a prefix of a larger one. Without a
    category the categories take turns until each is used up.

    Raises:
        ValueError: unknown split or category, a negative count, or more than there are.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    if category is not None and category not in CATEGORIES:
        raise ValueError(f"unknown category {category!r}: expected one of {', '.join(CATEGORIES)}")
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    chosen = CATEGORIES if category is None else (category,)
    columns = [[(name, prompt) for prompt in _ranked(split, name, seed)] for name in chosen]
    pairs = [pair for row in itertools.zip_longest(*columns) for pair in row if pair is not None]
    if count > len(pairs):
        where = "" if category is None else f" in category {category}"
        raise ValueError(f"asked for {count}, but {split}{where} has {len(pairs)} conversations")
    return [_conversation(name, prompt, seed) for name, prompt in pairs[:count]]
