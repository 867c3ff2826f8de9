"""Replace what points to a person: e-mail addresses, public IP addresses, telephone numbers.

The replacements are addresses and numbers reserved for examples (RFC 2606, 5737, 3849; 555-01xx), so nobody's are hit
and scrubbing twice changes nothing. The same address becomes the same replacement everywhere, also in another run.

Precision comes first. Of four numbers with dots these are left alone: private and reserved addresses, numbers of one
digit each (a section 3.2.1.4; of addresses only some public servers), and what a word such as "version" announces or
what goes on like one ("v1.10.2.33", "log4j-2.17.1.1", "10.4.22.1-beta"). Telephone numbers need a form that only they have: a
country's code after "+", or a national form with its separators; other forms count after a word such as "Tel.".
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar
from zlib import crc32

from llada.data.document import Document
from llada.data.filters.filter import Filter, Filtered
from llada.data.filters.view import TextView
from llada.settings import require


@dataclass(frozen=True)
class PiiFilter(Filter):
    """What is replaced, and by what: each match by one of the replacements of its kind."""

    emails: bool = True
    ips: bool = True
    phones: bool = True
    email_replacements: tuple[str, ...] = ("email@example.com", "firstname.lastname@example.org")
    ipv4_replacements: tuple[str, ...] = ("192.0.2.17", "192.0.2.154", "198.51.100.42", "203.0.113.8")
    ipv6_replacements: tuple[str, ...] = ("2001:db8::17", "2001:db8:5:2a::1")
    phone_replacements: tuple[str, ...] = ("555-0100", "555-0123", "555-0142", "555-0199")

    label: ClassVar = "Personal data"

    def __post_init__(self) -> None:
        for name in ("email", "ipv4", "ipv6", "phone"):
            require(
                bool(getattr(self, f"{name}_replacements")),
                f"{name}_replacements must not be empty; to keep this kind, switch it off",
            )

    def __call__(self, document: Document, view: TextView) -> Filtered:
        text, counts = scrub(document.text, self)
        return Filtered(replace(document, text=text) if counts else document, None, counts)

    def redact(self, text: str) -> str:
        return scrub(text, self)[0]


def scrub(text: str, settings: PiiFilter) -> tuple[str, dict[str, int]]:
    """The text with its personal data replaced, and how many were, by kind: "email", "ip", "phone"."""
    counts: dict[str, int] = {}
    if settings.emails and "@" in text:
        text = _replace(text, _emails(text), settings.email_replacements, "email", counts)
    if settings.ips:
        text = _replace(text, _ipv4(text), settings.ipv4_replacements, "ip", counts)
        if "::" in text or text.count(":") >= 7:
            text = _replace(text, _ipv6(text), settings.ipv6_replacements, "ip", counts)
    if settings.phones:
        text = _replace(text, _phones(text), settings.phone_replacements, "phone", counts)
    return text, counts


def _replace(
    text: str,
    spans: Iterable[tuple[int, int]],
    replacements: tuple[str, ...],
    kind: str,
    counts: dict[str, int],
) -> str:
    pieces: list[str] = []
    done = 0
    for start, end in spans:
        matched = text[start:end]
        if matched in replacements:
            continue
        pieces += text[done:start], replacements[crc32(matched.encode()) % len(replacements)]
        done = end
        counts[kind] = counts.get(kind, 0) + 1
    return "".join([*pieces, text[done:]]) if pieces else text


# The local part as it is used; RFC 5322 would also allow slashes and more, as in "medium.com/@somebody".
_LOCAL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.+'%-]*[A-Za-z0-9_+-])?\Z")
_MAX_LOCAL = 64  # RFC 5321
_MAIL_DOMAIN = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}([A-Za-z]{2,24})(?![A-Za-z0-9_(\[@]|-[A-Za-z0-9])"
)
_FILE_SUFFIXES = {"png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "json", "html", "md", "py"}


def _emails(text: str) -> Iterator[tuple[int, int]]:
    done = at = 0
    while (at := text.find("@", at) + 1) > 0:  # one after the sign
        if not (domain := _MAIL_DOMAIN.match(text, at)) or domain[1].lower() in _FILE_SUFFIXES:
            continue  # icon@2x.png
        before = max(done, at - 1 - _MAX_LOCAL)
        local = _LOCAL.search(text[before : at - 1])
        if local is None or local[0] == "git":  # git@github.com:a/b.git is an address of a machine
            continue
        if local.start() == 0 and before > done and _LOCAL.match(text[before - 1]):
            continue  # longer than any address
        done = domain.end()
        yield before + local.start(), done


# Without its first number: a search for a literal full stop is twice as fast as one for digits.
_IPV4_END = re.compile(r"\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}(?![A-Za-z0-9_]|\.[0-9]|-[A-Za-z])")
_IPV4_START = re.compile(r"[0-9]{1,3}\Z")
_NO_IPV4_BEFORE = re.compile(
    r"""(?: [A-Za-z0-9_.,] | [A-Za-z][/-] | [=~<>]= | \^ | [$€£¥₩]\s? | §\s?
      | (?:\b(?: v | ver | vers | version | versión | versão | release | build | firmware | kernel | driver | revision
             | rev | update | upgrade | chapter | section | sect | sec | clause | paragraph | article | appendix
             | figure | fig | table | example | rule | step )s?
         | 版本 | バージョン | 버전 ) [\s.:=#("'\u201c-]{0,3}
    )\Z""",
    re.VERBOSE | re.IGNORECASE,
)
_CONTEXT = 16  # characters before a number that are looked at


def _ipv4(text: str) -> Iterator[tuple[int, int]]:
    for match in _IPV4_END.finditer(text):
        dot, end = match.span()
        first = _IPV4_START.search(text[max(0, dot - 3) : dot])
        if first is None:
            continue
        start = dot - len(first[0])
        if (
            end - start > 7  # not four single digits
            and _is_public(text[start:end])
            and not _NO_IPV4_BEFORE.search(text[max(0, start - _CONTEXT) : start])
        ):
            yield start, end


# Public addresses are 2000::/3, so they start with 2 or 3.
_IPV6 = re.compile(r"[23][0-9A-Fa-f]{3}(?:(?:::?[0-9A-Fa-f]{1,4}){1,7}(?:::)?|::)(?![A-Za-z0-9_:])")


def _ipv6(text: str) -> Iterator[tuple[int, int]]:
    for match in _IPV6.finditer(text):
        start, end = match.span()
        if _is_public(match[0]) and not re.match(r"[A-Za-z0-9_:.]", text[start - 1 : start]):
            yield start, end


def _is_public(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # a number above 255, or with leading zeros; not eight groups
        return False
    return parsed.is_global and not parsed.is_multicast


# Something that may be a telephone number; cheap, because it starts at a digit and few texts have many.
_NUMBER = re.compile(r"[0-9][0-9 ().\u00a0\u2010-\u2013/-]{5,28}[0-9]")
_DASH = r"[-\u2010-\u2013]"
_PHONE = re.compile(
    rf"""(?<![A-Za-z0-9_$€£¥₩#=/@+*-]) (?<![0-9][.,:])
    (?: (?<![0-9][ ]) (?P<international> (?: \+[2-9] | \(\+[2-9][0-9]{{0,2}}\) )
                        (?:[ .()/\u00a0\u2010-\u2013-]{{0,3}}[0-9]){{6,14}} ) (?![ .-]?[0-9])
      # North America: +1 212 555 1234, (212) 555 1234, 212-555-1234, 1.212.555.1234
      | (?:\+1|\(\+1\)) [ .-]? \(?[2-9][0-9]{{2}}\)? [ .-]? [2-9][0-9]{{2}} [ .-]? [0-9]{{4}}
      | (?:1[ .-]?)? \([2-9][0-9]{{2}}\) [ .-]? [2-9][0-9]{{2}} [ .-] [0-9]{{4}}
      | (?:1[.-])? [2-9][0-9]{{2}} (?P<s>{_DASH}|\.) [2-9][0-9]{{2}} (?P=s) [0-9]{{4}}
      # With the 0 of long-distance calls: East Asia 03-1234-5678, 010-1234-5678, 0571-87654321; Britain
      # 020 7946 0958, 0161 496 0000, 01632 960123; France 01 23 45 67 89; in brackets (0123) 456 7890
      | 0[1-9][0-9]{{0,2}} {_DASH} (?: [0-9]{{3,4}} {_DASH} [0-9]{{4}} | [0-9]{{7,8}} )
      | (?<![0-9][ ]) 0[1-9] (?: [0-9][ ][0-9]{{4}}[ ][0-9]{{4}} | [0-9]{{2}}[ ][0-9]{{3}}[ ][0-9]{{4}}
                               | [0-9]{{3}}[ ][0-9]{{3}}[ ]?[0-9]{{3}} ) (?![ ]?[0-9])
      | (?<![0-9][ ]) 0[1-9] (?P<f>[ .]) [0-9]{{2}} (?:(?P=f)[0-9]{{2}}){{3}} (?![ ]?[0-9])
      | \(0[1-9][0-9]{{1,3}}\) [ ]? [0-9]{{3,4}} [ -]? [0-9]{{3,4}}
      # China's and Brazil's mobiles: 138-1234-5678, (11) 91234-5678
      | 1[3-9][0-9] {_DASH} [0-9]{{4}} {_DASH} [0-9]{{4}}
      | \([1-9][0-9]\) [ ]? 9?[0-9]{{4}} {_DASH} [0-9]{{4}}
    ) (?! (?!x[0-9]|ext) [A-Za-z0-9_$€£¥₩%°*] | {_DASH}[0-9] | [.,:][0-9] )""",
    re.VERBOSE,
)
_ANNOUNCED = re.compile(
    r"""(?: \b(?: tel | tél | telefon | telefono | teléfono | telefone | téléphone | telephone | phone | telefax | fax
            | mobile | mob | whatsapp | handy | cell(?:[ ]phone | [ ]?: | [ ]no) | call[ ]us | call[ ](?:at|on)
            | reach[ ]us[ ]at )
        | 电话 | 電話 | 手机 | 手機 | 传真 | 傳真 | 携帯 | 전화 | 휴대폰 | 팩스 | ☎ | ☏ | 📞 )
      [^\w\n]{0,3} (?: (?: number | no | nr | num | us | at | is | on | 번호 | 号码 | 番号 ) [^\w\n]{1,3} ){0,2} \Z""",
    re.VERBOSE | re.IGNORECASE,
)
_DATE_OR_YEARS = re.compile(
    rf"[0-9]{{1,4}}([/. -]|{_DASH})[0-9]{{1,2}}\1[0-9]{{1,4}}|(?:1[89]|20)[0-9]{{2}}\D{{1,3}}(?:1[89]|20)[0-9]{{2}}"
)
_NOT_DIGITS = re.compile(r"[^0-9]+")


def _phones(text: str) -> Iterator[tuple[int, int]]:
    done = 0
    for number in _NUMBER.finditer(text):
        start, end = number.span()
        is_phone = False
        for match in _PHONE.finditer(text, max(done, start - 2), min(len(text), end + 3)):
            if match["international"] is None or _is_e164(_NOT_DIGITS.sub("", match[0])):
                is_phone, done = True, match.end()
                yield match.span()
        if not is_phone and _ANNOUNCED.search(text[max(done, start - 32) : start].rstrip("(+")):
            digits = len(_NOT_DIGITS.sub("", number[0]))
            if 7 <= digits <= 15 and not _DATE_OR_YEARS.fullmatch(number[0]):
                done = end
                yield start - (text[start - 1 : start] == "(" and ")" in number[0]), end


def _is_e164(digits: str) -> bool:
    """Whether the digits after "+" can be a number of ITU-T E.164."""
    if digits.endswith("00000"):  # +200 000 000 is an amount
        return False
    return len(digits) == 11 if digits[0] == "7" else 9 <= len(digits) <= 15  # 7: Russia, Kazakhstan
