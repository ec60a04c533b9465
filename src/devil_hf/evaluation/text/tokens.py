"""Caption tokens as the COCO caption toolkit makes them, without Java.

The toolkit runs the Penn Treebank tokeniser of Stanford CoreNLP 3.4.1 in lower case and then drops punctuation. This is a
regular expression that was written from how that program answers: clitics are split off (`do n't`, `dog 's`), hyphenated
words and numbers stay whole, abbreviations keep their full stop, brackets become `-lrb-`, quotes of every kind go. Where
captions are odd (links, phone numbers, emoticons) it may differ in a token. It stays our own code because no kept library has
these rules without Java.
"""

import re

# Words that keep a full stop in any case; those that do so with a capital only; those that do so before a number.
ABBREVIATIONS = """
    adj adm adv al ala alex apr ariz assn assoc asst atty aug ave bhd bldg blvd brig bros calif capt cf cie cmdr co col
    colo conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov govs hon inc
    ind insp intl invt jan jos jr jul jun kan kans ky lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mr mrs
    ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc ppte ppty pres prof pte ptes pty ptys pvt rd rep reps rev
    rt sen sens sep sept seq sfc sgt spc sq sr st ste supt sys tel tenn thu thurs treas tue tues univ va vs vt wed wis
    wisc wm wyo
"""
CAPITAL_ABBREVIATIONS = """
    ark az del ill la mass miss ore pa tex wash
"""
NUMBER_ABBREVIATIONS = """
    art ca fig figs no nos op pp prop
"""
# After a single letter with a full stop, these begin a sentence, and the letter loses it.
SENTENCE_STARTS = """
    A About After An As At But He Her Here If In It Last Many More Now Once One Other Our She Since So Some Such That
    The Their Then There These They This We What When While Yet You
"""
SPLIT_WORDS = {
    "cannot": ("can", "not"),
    "gimme": ("gim", "me"),
    "lemme": ("lem", "me"),
    "gonna": ("gon", "na"),
    "wanna": ("wan", "na"),
    "gotta": ("got", "ta"),
}
RENAMED = {
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **{"€": "$", "£": "#", "¢": "cents", "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"},
}
DROPPED = set("'\"`‘’“”«»‹›.?!,:;-–—…\x91\x92\x93\x94\x96\x97")

_LETTER = r"[^\W\d_]"
_CHARACTER = r"[^\W_²³¹⁰-₉¼-¾⅐-⅞]"
_WORD = rf"{_CHARACTER}(?:_*(?:{_CHARACTER}|[\u0300-\u036f]))*+"
_APOSTROPHE = r"['’\x92]"
_BRACKET_OF_SMILEY = r"[()DPdpO\\{@|\[\]]"

_SMILEY = re.compile(rf"[<>]?[:;=][-o*']?{_BRACKET_OF_SMILEY}")
_CLITIC = re.compile(rf"^(n?){_APOSTROPHE}(s|m|d|ll|re|ve|t)$")


def _any(words: str) -> str:
    return "|".join(sorted(words.split(), key=len, reverse=True))


_TOKEN = re.compile(
    "|".join(
        (
            r"</?[A-Za-z!][^<>]*>",  # tags
            r"(?:https?|ftp)://[^\s<>\"]*[^\s<>\"().,;:!?]",
            r"www\.(?:[\w-]+\.)+[A-Za-z]{2,4}",
            r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*",
            r"\(\d{3}\)[ -]?\d{3}[ -]\d{4}",  # telephone numbers
            rf"{_SMILEY.pattern}(?!\w)",
            r"\^_\^",
            r"[#@][^\W\d]\w*",
            rf"(?:{_LETTER}(?:\.{_LETTER})+\.|[\d.,]*\d)(?:-{_WORD})+",  # u.s.-based, 1,000-foot
            rf"{_LETTER}(?:\.{_LETTER})+(?:\.|(?!\w))",  # a.m.
            rf"{_LETTER}++(?:\.{_LETTER}++)+",  # a link, or a sentence that ends without a space
            rf"(?:(?i:{_any(ABBREVIATIONS)})|{_any(CAPITAL_ABBREVIATIONS.title())}|{_any(CAPITAL_ABBREVIATIONS.upper())})\.",
            rf"(?i:{_any(NUMBER_ABBREVIATIONS)})\.(?=\s*\d)",
            rf"{_LETTER}\.(?!\w)(?!\s+(?:{_any(SENTENCE_STARTS)})\b)",
            rf"{_WORD}(?:-{_WORD})*\.(?=[,;:])",
            rf"{_LETTER}+?(?=n{_APOSTROPHE}t(?!\w))",  # do|n't
            rf"(?i:n{_APOSTROPHE}t)(?!\w)",
            rf"(?i:[odl]{_APOSTROPHE}{_LETTER}+|ma{_APOSTROPHE}am|c{_APOSTROPHE}mon)",
            rf"(?i:y{_APOSTROPHE})(?={_LETTER})",
            rf"(?i:{_LETTER}*[aeiouy]{_APOSTROPHE}[aeiou]{_LETTER}*)",  # hawai'i
            rf"(?i:dunkin|somethin|ol|[dlj]){_APOSTROPHE}",
            rf"{_APOSTROPHE}(?i:n){_APOSTROPHE}",
            rf"{_APOSTROPHE}(?i:s|m|d|ll|re|ve|em|till?|cause|n)(?!\w)",
            r"'(?i:t)(?=(?i:is|was)(?!\w))",
            rf"{_APOSTROPHE}\d\ds?(?!\w)",
            r"[A-Z]+&[A-Z]+",  # at&t
            rf"{_LETTER}++[!?]{_LETTER}++",
            rf"{_WORD}(?:-{_WORD})*(?:/{_WORD}(?:-{_WORD})*)+",
            rf"{_WORD}(?:-{_WORD})+",
            r"[-+]?\d*(?:[.,:/-]\d+)+",
            r"[-+]\d+",
            _WORD,
            r"[!?]{2,}",
            r"-{5,}",
            r"[^\s\u200b\ufeff]",
        )
    )
)


def ptb_tokens(caption: str) -> list[str]:
    """The tokens of a caption, in lower case, without punctuation."""
    for entity, character in (("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&apos;", "'")):
        caption = caption.replace(entity, character)
    tokens: list[str] = []
    for match in _TOKEN.finditer(caption.replace("\xad", "")):
        token = match.group().lower()
        if token in DROPPED or token[0] > "\uffff":
            continue
        if token in SPLIT_WORDS:
            tokens += SPLIT_WORDS[token]
        elif token in RENAMED:
            tokens.append(RENAMED[token])
        elif _SMILEY.fullmatch(token):
            tokens.append("".join(RENAMED.get(character, character) for character in token))
        else:
            tokens += _CLITIC.sub(r"\1'\2", token).split()
    return tokens
