"""The head word of an English phrase: what the thing is called that it speaks of.

The rule is simple, and every figure that names head words is of it: without what is said of the picture ("a photo of", "there
is", "the top of") and without determiners, the phrase goes on to the first preposition, conjunction, "of", relative word or
verb, and its last word is its head, as one of the thing: "two young girls in blue" -> "girl". The function words are those of
`devil_hf.questions.grounding`. It knows no grammar:

* colours, sizes and the like are joined ("a black and white dog", "a small, brown dog");

* a verb is a form of "be" or "have", a word in -ing that is no noun of `NOUNS_IN_ING`, a verb of `VERBS` in -s, or the bare form
  of one behind a plural ("two dogs run", not "a hot dog stand"); a participle in -ed ends no phrase ("a man dressed in red");
* "a group of people" has the head "group", as the rule says;
* synonyms ("child", "boy") are different words.
"""

import re
from itertools import dropwhile

from devil_hf.evaluation.text.words import word_list
from devil_hf.questions.grounding import BREAKS, DETERMINERS, DIRECTION, EMPTY_WORDS, OPENING


def _listed(words: str) -> frozenset[str]:
    return frozenset(words.split())


MORE_BREAKS = _listed("about after alone before caught during like made nearby out outdoors past seen together")
BE = _listed("is are was were be been being has have had")
# What goes before "and" or a comma, and is no thing.
JOINED = _listed(
    """beige big black blonde blue bright brown checkered colorful dark dotted golden gray green grey large light little long
    maroon old orange pink plain purple red short small striped tall tan teal white wide yellow young"""
)
NOUNS_IN_ING = _listed(
    """anything awning being building ceiling clothing covering crossing dressing drawing earring evening everything icing king
    landing lightning lining morning nothing offering opening painting parking pudding railing ring rigging scaffolding siding
    sibling sling something spring sting string swing thing thong wedding wing writing"""
)
# Third person; the frequent ones behind people and animals in captions, but for those that name things, too.
VERBS = _listed(
    """appears attempts bites blows bounds carries catches chases chews climbs crosses crouches dances digs dives does dribbles
    drinks drives eats emerges enjoys falls flies flips follows gathers gets gives goes hangs helps hits holds hugs jogs juggles
    jumps kicks kisses kneels laughs lays leads leans leaps licks lies looks makes performs plays points poses prepares pulls
    pushes puts reaches reads rests retrieves rides rolls runs shakes shoots shows sings sits skateboards sleeps slides smiles
    sniffs splashes sprints stands stares surfs swims swings takes talks throws touches tries uses wades waits walks watches
    wears wrestles"""
)
IRREGULAR = {
    "people": "person", "men": "man", "women": "woman", "children": "child", "feet": "foot", "teeth": "tooth", "mice": "mouse",
    "geese": "goose", "oxen": "ox", "leaves": "leaf", "knives": "knife", "wolves": "wolf", "shelves": "shelf", "scarves": "scarf",
    "calves": "calf", "loaves": "loaf", "wives": "wife", "hooves": "hoof", "elves": "elf", "halves": "half", "buses": "bus",
    "movies": "movie", "cookies": "cookie", "hoodies": "hoodie", "brownies": "brownie", "shoes": "shoe", "canoes": "canoe",
   
    "snowshoes": "snowshoe", "clothes": "clothes", "skis": "ski", "horseshoes": "horseshoe", "toes": "toe", "axes": "axe",
    "policemen": "policeman",
    "firemen": "fireman", "fishermen": "fisherman", "snowmen": "snowman", "businessmen": "businessman",
}  # fmt: skip
PARTICIPLE = 6  # letters from which on a last word in -ed is one: "dressed", but "sled", "shed"


def head_word(phrase: str) -> str | None:
    """The head word of a phrase or description, in lower case and of one thing, see above; None of a text without words."""
    content = DIRECTION.sub("and", OPENING.sub("", " ".join(phrase.lower().split()).replace(" 's", "'s")))
    words = word_list(re.sub(r"[,.;:]", " and ", content))
    words = list(dropwhile(lambda word: word in EMPTY_WORDS | DETERMINERS | BREAKS, words))
    group: list[str] = []
    for word in words:
        if word == "and" and group and group[-1] in JOINED:
            continue
        if group and _ends(word, group[-1]):
            break
        group.append(word)
    while len(group) > 1 and group[-1].endswith("ed") and len(group[-1]) >= PARTICIPLE:
        group.pop()
    words = group or word_list(content)[-1:]  # "two" alone
    return singular(words[-1].removesuffix("'s")) if words else None


def singular(word: str) -> str:
    """One of the thing; "glass" of "glasses", so that pairs of things are what they are made of."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies") and len(word) > 5:
        return f"{word[:-3]}y"
    return word[:-2] if word.endswith(("sses", "xes", "ches", "shes", "oes")) else word[:-1]


def _ends(word: str, before: str) -> bool:
    """Whether a phrase ends in front of a word."""
    if word in DETERMINERS:
        return before not in JOINED  # "a black and a white dog"
    if word in BREAKS | MORE_BREAKS | EMPTY_WORDS | BE | VERBS:
        return True
    if word.endswith("ing") and word not in NOUNS_IN_ING:
        return True
    several = before != singular(before)
    return several and any(f"{word}{ending}" in VERBS for ending in ("s", "es"))


__all__ = ["head_word", "singular"]
