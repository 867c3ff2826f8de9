"""Words as the published filter thresholds count them: English tokenisation, and characters where no spaces are.

The limits of Gopher, C4 and FineWeb were set on the words of spaCy's English tokenizer as datatrove calls it. This
follows its behaviour: a text is cut at white space; from each piece affixes are taken off in turn (quotes, brackets,
"'s", units after a digit, a final period except after abbreviations), and what remains is cut at infixes (hyphens
and slashes between letters, ellipses); contractions come apart ("do" + "n't"). Words hang on their piece alone, so
pieces are remembered, and a text costs little more than the look-up of its pieces.

Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan and Yi are written without spaces between words. There a
character with its combining marks is a word.
"""

from __future__ import annotations

import functools
import re
import struct
import unicodedata
from collections.abc import Iterable
from hashlib import blake2b

import numpy as np

WORD = np.dtype(
    [
        ("key", "<u8"),  # hash of the word, the same in every process
        ("chars", "<u4"),
        ("is_symbol", "?"),  # nothing but punctuation and control characters
        ("script", "u1"),  # of its first letter: one of the constants below
        ("stop", "u1"),  # SENTENCE_END, PUNCTUATION or 0
    ],
    align=True,
)
NO_LETTER, LATIN, UNSEGMENTED, OTHER_SCRIPT = range(4)
PUNCTUATION, SENTENCE_END = 1, 2

_LONGEST_REGULAR = 1000  # characters; pieces beyond are no words, and are cut at punctuation in linear time
_LONGEST_REMEMBERED = 100  # characters
_REMEMBERED_PIECES = 1 << 18  # about 60 MB

# --- Character classes ------------------------------------------------------------------------------------------------


def _class(characters: Iterable[str]) -> str:
    """The inside of a regular expression's [...], as ranges: single characters beyond U+FFFF are slow to match."""
    ranges: list[list[int]] = []
    for code in sorted(map(ord, characters)):
        if ranges and code <= ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)


def _characters(*blocks: tuple[int, int]) -> list[str]:
    return [chr(code) for first, last in blocks for code in range(first, last + 1)]


# Characters that end a sentence: the Unicode property Sentence_Terminal (PropList.txt, Unicode 15.1), less a few of
# scripts that came later.
SENTENCE_ENDS = frozenset(
    "!.?։؝؞؟۔܀܁܂߹࠷࠹࠽࠾।॥၊။።፧፨᙮᜵᜶។៕៖៙៚᠃᠉᥄᥅᪨᪩᪪᪫᭚᭛᭞᭟᭽᭾᰻᰼᱾᱿‼‽⁇⁈⁉⸮⸼⹓⹔。꓿꘎꘏꛳꛷꡶꡷꣎꣏꤯꧈꧉꩝꩞꩟꫰꫱꯫﹒﹖﹗！．？｡"
    "𐩖𐩗𐽕𐽖𐽗𐽘𐽙𐾆𐾇𐾈𐾉𑁇𑁈𑂾𑂿𑃀𑃁𑅁𑅂𑅃𑇅𑇆𑇍𑇞𑇟𑈸𑈹𑈻𑈼𑊩𑑋𑑌𑗂𑗃𑗉𑗊𑗋𑗌𑗍𑗎𑗏𑗐𑗑𑗒𑗓𑗔𑗕𑗖𑗗𑙁𑙂𑜼𑜽𑜾𑥄𑥆𑩂𑩃𑪛𑪜𑱁𑱂𑻷𑻸𑽃𑽄𖩮𖩯𖫵𖬷𖬸𖭄𖺘𛲟𝪈"
)
# What a word may consist of without counting as one (Gopher): the set that the thresholds were measured with. It
# has no bullet: "•" alone counts as a word.
_SYMBOLS = "".join(
    [
        *"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~«»´–—’“”„…∶━►、。〈〉《》「」【】！％（），．１：；？～",
        *_characters((0, 8), (11, 12), (13, 31), (127, 159)),
        *SENTENCE_ENDS,
    ]
)
_LETTERS = [c for c in _characters((0x41, 0x2FFF), (0xA640, 0xD7FF)) if c.isalpha()]
_LOWER = _class(c for c in _LETTERS if not c.isupper())  # letters without case count as both
_UPPER = _class(c for c in _LETTERS if not c.islower())
_ICONS = _class(
    c
    for c in _characters((0xA6, 0x33FF), (0xFFE4, 0xFFFD), (0x1F000, 0x1FAFF))
    if unicodedata.category(c) == "So"
)
_MARKS = _class("…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪")
_QUOTES = _class("',\"”“`‘´’‚„»«「」『』（）〔〕【】《》〈〉\u2329\u232a⟦⟧")
_CURRENCIES = _class("$£€¥฿﷼") + "\u20a0-\u20bf"
_DOLLARS = r"(?:US|C|A)\$"
_UNITS = (
    r"[kdcm]?m[²³]?|ha|[µn]m|yd|in|ft|[kmµ]?g|t|lb|oz|k?m/[sh]|kmh|mph|h?Pa|mbar|mb|[MKGT]B|[kgt]b|[TGMK]|%"
)
_LETTER = r"[^\W\d_]"

_UNSEGMENTED_BLOCKS = _characters(
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),
    (0x3040, 0x30FF),  # kana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xA000, 0xA48F),  # Yi
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),
)
_UNSEGMENTED_LETTERS = _class(c for c in _UNSEGMENTED_BLOCKS if c.isalpha()) + "\U00020000-\U000323af"
# With the Tibetan syllable dot and the invisible joiners and separators, which stand inside and between words.
_ATTACHED = (
    _class(c for c in _UNSEGMENTED_BLOCKS if unicodedata.category(c)[0] == "M") + "\u0f0b\u0f0c\u200b-\u200d"
)
_IS_UNSEGMENTED = re.compile(f"[{_UNSEGMENTED_LETTERS}]")
_UNSEGMENTED_WORD = re.compile(
    rf"[{_UNSEGMENTED_LETTERS}][{_ATTACHED}]*|[^\W{_UNSEGMENTED_LETTERS}]+|[^\w\s]"
)

# --- Affixes, infixes, exceptions -------------------------------------------------------------------------------------

_PREFIX = re.compile(rf"\.\.+|\+(?![0-9])|{_DOLLARS}|[§%=—–{_MARKS}{_QUOTES}{_CURRENCIES}{_ICONS}]")
# A period comes off after a digit, a letter of lower case or a mark, or after two of upper case: "U.S." keeps its own.
_SUFFIX = re.compile(
    rf"(?:['’][sS]|……|(?<=[0-9])(?:\+|{_DOLLARS}|[{_CURRENCIES}]|{_UNITS})"
    rf"|(?<=[0-9{_LOWER}%²+|\-{_MARKS}{_QUOTES}])\.|(?<=[{_UPPER}][{_UPPER}])\.|[—–{_MARKS}{_QUOTES}{_ICONS}])$"
)
_SUFFIX_WINDOW = 8  # characters: the longest suffix and the two letters that it may ask for
_INFIX = re.compile(
    rf"\.\.+|…|[{_ICONS}]|(?<=[0-9])[+\-*^](?=[0-9-])|(?<=[{_LOWER}{_QUOTES}])\.(?=[{_UPPER}{_QUOTES}])"
    rf"|(?<={_LETTER}),(?={_LETTER})|(?<=[^\W_])(?:---?|-|––?|——?|~)(?={_LETTER})|(?<=[^\W_])[:<>=/](?={_LETTER})"
)
_HOST = r"(?:[A-Za-z0-9\u00a1-\uffff](?:[A-Za-z0-9\u00a1-\uffff_-]{0,62}[A-Za-z0-9\u00a1-\uffff])?\.)+"
_URL = re.compile(
    rf"(?:[\w+.-]{{2,}}://)?(?:\S+@)?(?:[1-9]\d{{0,2}}(?:\.\d{{1,3}}){{3}}|{_HOST}[{_LOWER}]{{2,63}})"
    r"(?::\d{2,5})?(?:[/?#]\S*)?"
)
# What most pieces are, as the rules below would split them: a word or some with hyphens, perhaps with "'s", one mark,
# and quotes around.
_PLAIN = re.compile(r"""(["“(]?)([A-Za-z]{3,}(?:-[A-Za-z]+)*(?<=[a-z]))(['’]s)?([.,;:!?]?)(["”]?)""")
_HYPHEN = re.compile("(-)")
_ALL_PIECES = re.compile(r"\w+|[^\w\s]")


def _exceptions() -> dict[str, tuple[str, ...]]:
    """Pieces that come apart, or stay whole, against the rules: piece -> its words."""
    exceptions: dict[str, tuple[str, ...]] = {}

    def add(heads: str, *tails: str) -> None:
        """Each head with the tails, lower-case and capitalised, with and without apostrophes."""
        for head in heads.split():
            for form in (head, head.title()):
                for parts in ((form, *tails), (form, *(tail.replace("'", "") for tail in tails))):
                    exceptions["".join(parts)] = parts

    everyone, asking = "i you he she it we they", "who what when where why how there"
    add("i", "'m")
    add("i", "'m", "a")
    for tails in (("'ll",), ("'ll", "'ve"), ("'d",), ("'d", "'ve")):
        add(f"{everyone} {asking} that this these those", *tails)
    add(f"he she it {asking} that this", "'s")
    add(f"i you we they {asking} these those could might must should would", "'ve")
    add(f"you we they {asking} these those", "'re")
    verbs = "ca could do does did had may might must need ought sha should wo would"
    add(f"{verbs} ai are is was were have has dare", "n't")
    add(verbs, "n't", "'ve")
    add("not", "'ve")
    for head, tail in (("can", "not"), ("gon", "na"), ("got", "ta"), ("let", "'s"), ("c'm", "on")):
        exceptions[head + tail] = (head, tail)
        exceptions[head.capitalize() + tail] = (head.capitalize(), tail)
    exceptions |= {"y'all": ("y'", "all"), "yall": ("y", "all")}
    exceptions |= {f"{how}'d'y": (how, "'d", "'y") for how in ("how", "How")}
    for hour in range(1, 13):
        exceptions |= {f"{hour}{half}": (str(hour), half) for half in ("am", "pm", "a.m.", "p.m.")}
    for word in ("ill", "its", "hell", "shell", "shed", "were", "well"):  # words in their own right
        del exceptions[word], exceptions[word.title()]
    whole = (
        "'s 'S ‘s ‘S 'd 're 'em 'll 'nuff and/or w/o ma'am Ma'am o'clock O'clock '' ' C++ \\\") <space> \\n \\t "
        "'Cause 'cause 'cos 'Cos 'coz 'Coz 'cuz 'Cuz 'bout lovin' Lovin' havin' Havin' "
        "doin' Doin' goin' Goin' nothin' Nothin' nuthin' Nuthin' ol' Ol' somethin' Somethin' "
        "Ak. Ala. Apr. Ariz. Ark. Aug. Calif. Colo. Conn. Dec. Del. Feb. Fla. Ga. Ia. Id. Ill. Ind. Jan. Jul. Jun. "
        "Kan. Kans. Ky. La. Mar. Mass. Mich. Minn. Miss. Mt. N.C. N.D. N.H. N.J. N.M. N.Y. Neb. Nebr. Nev. Nov. Oct. "
        "Okla. Ore. Pa. S.C. Sep. Sept. Tenn. Va. Wash. Wis. a.m. Adm. Bros. co. Co. Corp. D.C. Dr. e.g. E.g. E.G. "
        "Gen. Gov. i.e. I.e. I.E. Inc. Jr. Ltd. Md. Messrs. Mo. Mont. Mr. Mrs. Ms. p.m. Ph.D. Prof. Rep. Rev. Sen. "
        "St. vs. v.s. ä. ö. ü. "
        ":) :-) :)) :-)) :))) (: (-: =) (= :] :-] [: =] ;) ;-) (; :( :-( :(( :((( :-(( ): )-: =( >:( :') :'-) :'( :'-( "
        ":/ :-/ =/ =| :| :-| :1 :P :-P :p :-p :O :-O :o :-o :0 :-0 :() :* :-* :3 :-3 =3 :> :-> :X :-X :x :-x :D :-D ;D "
        ";-D =D 8) 8-) ^_^ ^__^ >.< >.> <.< ._. ;_; -_- -__- v.v V.V v_v V_V o_o o_O O_o O_O 0_o o_0 0_0 o.O O.o O.O o.o "
        "0.0 o.0 0.o @_@ <3 <33 </3 :} :-} (o: :o) [-: [= ]= 8D xD XD xDD XDD >:o (^_^) (-_-) (._.) (>_<) (*_*)"
    )
    exceptions |= {
        piece: (piece,) for piece in [*whole.split(), *(f"{c}." for c in "abcdefghijklmnopqrstuvwxyz")]
    }
    curly = {
        piece.replace("'", "’"): tuple(w.replace("'", "’") for w in ws) for piece, ws in exceptions.items()
    }
    return exceptions | curly


_EXCEPTIONS = _exceptions()


def _split_regular(piece: str, exceptions: dict[str, tuple[str, ...]]) -> list[str]:
    """Take prefixes and suffixes off in turn, then cut the middle at its infixes."""
    before: list[str] = []
    after: list[str] = []
    rest = piece
    while rest and rest not in exceptions:
        match = _PREFIX.match(rest)
        start = match.end() if match else 0
        if start and rest[start:] in exceptions:
            before.append(rest[:start])
            rest = rest[start:]
            break
        tail = _suffix_length(rest[start:])
        if tail and rest[:-tail] in exceptions:
            after.append(rest[-tail:])
            rest = rest[:-tail]
            break
        if not start and not tail:
            break
        if start:
            before.append(rest[:start])
        if tail:
            after.append(rest[-tail:])
        rest = rest[start : len(rest) - tail]
    if rest in exceptions:
        middle = list(exceptions[rest])
    else:
        middle = [rest] if not rest or rest.isalnum() or _URL.fullmatch(rest) else _split_infixes(rest)
    return [word for word in (*before, *middle, *reversed(after)) if word]


def _suffix_length(text: str) -> int:
    if text.endswith(".."):
        return len(text) - len(text.rstrip("."))
    match = _SUFFIX.search(text[-_SUFFIX_WINDOW:])
    return len(match[0]) if match else 0


def _split_infixes(text: str) -> list[str]:
    words, start = [], 0
    for match in _INFIX.finditer(text):
        if match.start() > 0:
            words += [text[start : match.start()], match[0]]
            start = match.end()
    return [*words, text[start:]]


# Exceptions of several ordinary words are found inside pieces as well: "great:)" ends in one smiley.
_JOINED = {words: piece for piece in _EXCEPTIONS if len(words := tuple(_split_regular(piece, {}))) > 1}
_LONGEST_JOINED = max(map(len, _JOINED))


def _join_exceptions(words: list[str]) -> list[str]:
    joined: list[str] = []
    i = 0
    while i < len(words):
        for size in range(min(_LONGEST_JOINED, len(words) - i), 1, -1):
            if piece := _JOINED.get(tuple(words[i : i + size])):
                joined += _EXCEPTIONS[piece]
                i += size
                break
        else:
            joined.append(words[i])
            i += 1
    return joined


def split_piece(piece: str) -> list[str]:
    """The words of a text without white space, in order; together they are the text."""
    if piece in _EXCEPTIONS:
        return list(_EXCEPTIONS[piece])
    if piece.isalpha() and piece.isascii():
        return [piece]
    if plain := _PLAIN.fullmatch(piece):
        before, core, genitive, mark, after = plain.groups("")
        if core not in _EXCEPTIONS and core + mark not in _EXCEPTIONS:
            cores = _HYPHEN.split(core) if "-" in core else [core]
            return [word for word in (before, *cores, genitive, mark, after) if word]
    if not piece.isascii() and _IS_UNSEGMENTED.search(piece):
        return _UNSEGMENTED_WORD.findall(piece)
    if len(piece) > _LONGEST_REGULAR:
        return _ALL_PIECES.findall(piece)
    words = _split_regular(piece, _EXCEPTIONS)
    return _join_exceptions(words) if len(words) > 1 else words


def split_words(text: str) -> list[str]:
    """The words of a text, in order; punctuation marks are words too."""
    return [word for piece in text.split() for word in split_piece(piece)]


# --- Words as numbers -------------------------------------------------------------------------------------------------


def _record(word: str) -> bytes:
    """A word as one WORD."""
    key = blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    if word.isascii() and word.isalpha():
        return key + struct.pack("<I?BBx", len(word), False, LATIN, 0)
    stop = SENTENCE_END if word in SENTENCE_ENDS else 0
    if not stop and all(unicodedata.category(c)[0] == "P" for c in word):
        stop = PUNCTUATION
    script = next((_script(c) for c in word if c.isalpha()), NO_LETTER)
    return key + struct.pack("<I?BBx", len(word), not word.strip(_SYMBOLS), script, stop)


_remembered_record = functools.lru_cache(1 << 16)(_record)


def _script(letter: str) -> int:
    if letter < "\u0250" or "\u1e00" <= letter <= "\u1eff":
        return LATIN
    return UNSEGMENTED if _IS_UNSEGMENTED.match(letter) else OTHER_SCRIPT


class _Pieces(dict[str, bytes]):
    """Piece -> its words as bytes of WORD. A memory of the frequent ones: dropped when full."""

    def __missing__(self, piece: str) -> bytes:
        words = b"".join(
            _remembered_record(word) if len(word) <= _LONGEST_REMEMBERED else _record(word)
            for word in split_piece(piece)
        )
        # Long pieces rarely come again: addresses and, above all, sentences without spaces.
        if len(piece) <= 16 or (len(piece) <= _LONGEST_REMEMBERED and piece.isascii()):
            if len(self) >= _REMEMBERED_PIECES:
                self.clear()
            self[piece] = words
        return words


_PIECES = _Pieces()


def encode_words(pieces: Iterable[str]) -> np.ndarray:
    """WORD (words,): the words of texts without white space, read-only."""
    return np.frombuffer(b"".join(map(_PIECES.__getitem__, pieces)), dtype=WORD)
