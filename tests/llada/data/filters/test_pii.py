import gzip
import ipaddress
import json
import random
import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llada.data.filters.pii import PiiFilter, scrub

CONFIG = PiiFilter()


def rows(path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def changed(text: str) -> dict[str, int]:
    return scrub(text, CONFIG)[1]


@pytest.mark.parametrize(
    ("before", "found", "after"),
    [
        ("Write to ", "joe.smith+tag@mail.example.co.uk", "."),
        ("联系", "abc@qq.com", "吧"),
        ("<", "a@b.org", ">"),
        ("__email__ = '", "gabriel-kunz@uergs.edu.br", "'"),
    ],
)
def test_emails(before, found, after):
    text, counts = scrub(before + found + after, CONFIG)
    assert counts == {"email": 1}
    assert text.removeprefix(before).removesuffix(after) in CONFIG.email_replacements


@pytest.mark.parametrize(
    "text",
    [
        "icon@2x.png",
        "thanks @user",
        "a @ b.com",
        "git@github.com:x/y.git",
        "https://medium.com/@some.body/x",
        "W@x.T",
        "np.sum(a@b.mean(axis=0))",
        "@property",
        "user@localhost",
        "x" * 80 + "@example.org",
    ],
)
def test_what_is_no_email(text):
    assert scrub(text, CONFIG) == (text, {})


V4 = ("93.184.216.34", "8.8.4.44", "172.100.0.8")
V6 = ("2a00:1450:4001:80b::200e", "2001:4860:4860:0:0:0:0:8888")


@pytest.mark.parametrize(
    ("found", "frame"),
    [(a, f) for a in V4 + V6 for f in ("server {} is down", "http://{}/x", "[{}]:443", "{}.")]
    + [(a, f) for a in V4 for f in ("10.0.0.1-{}", "IP:{}")],
)
def test_public_addresses(found, frame):
    text, counts = scrub(frame.format(found), CONFIG)
    pool = CONFIG.ipv6_replacements if ":" in found else CONFIG.ipv4_replacements
    assert counts == {"ip": 1}
    assert text in {frame.format(address) for address in pool}


@given(st.ip_addresses(v=4))
@example(ipaddress.ip_address("224.0.0.1"))
@example(ipaddress.ip_address("100.64.0.1"))
def test_exactly_the_public_ipv4_addresses_are_replaced(address):
    single_digits = len(str(address)) == 7
    public = address.is_global and not address.is_multicast
    assert bool(changed(f"host {address} answers")) == (public and not single_digits)


@given(st.ip_addresses(v=6))
@example(ipaddress.ip_address("fe80::1"))
@example(ipaddress.ip_address("2001:db8::5"))
@example(ipaddress.ip_address("2606:4700::"))
@example(ipaddress.ip_address("2002::"))
def test_exactly_the_public_ipv6_addresses_are_replaced(address):
    public = address.is_global and address in ipaddress.ip_network("2000::/3")
    assert bool(changed(f"host {address} answers")) == public


@given(
    st.lists(st.integers(0, 99), min_size=4, max_size=4),
    st.sampled_from(
        [
            "version {}",
            "Version: {}",
            "v{}",
            "v. {}",
            "release {}",
            "Chrome/{}",
            "log4j-{}",
            "pkg=={}",
            "版本 {}",
            "{}-beta",
            "{}rc1",
            "{}.7",
            "see section {}",
            "§ {}",
            "Table {}",
            "$ {}",
            "firmware ({})",
            "a_{}",
        ]
    ),
)
def test_version_and_section_numbers_are_no_addresses(parts, frame):
    assert not changed(frame.format(".".join(map(str, parts))))


PHONES = """(212) 555-1234|212-555-1234|212.555.1234|1-800-555-1234|1 (212) 555 1234|+1 212 555 1234|+1 (617) 573-5591
+12125551234|+44 20 7946 0958|+49 (0)30 123456|+86 138 1234 5678|+33 1 23 45 67 89|(+82) 10-1234-5678|+32 (0)2 790 75 75
020 7946 0958|0161 496 0000|01632 960123|01 23 45 67 89|03-1234-5678|010-1234-5678|010-12345678|0571-87654321
138-1234-5678|(11) 91234-5678|(0123) 456 7890|+7 495 123-45-67|+91-9876543218""".replace("\n", "|").split("|")


@pytest.mark.parametrize("phone", PHONES)
@pytest.mark.parametrize(
    "frame", ["{}", "Call {}.", "Tel:{}", "{} or write", "in 2010:\n{}\n", "电话{}转", "P: {} • F"]
)
def test_phones_in_forms_of_their_own(phone, frame):
    text, counts = scrub(frame.format(phone), CONFIG)
    assert counts == {"phone": 1}
    assert text in {frame.format(number) for number in CONFIG.phone_replacements}


@pytest.mark.parametrize(
    "text",
    [
        "Tel.: 030/1234567",
        "电话：13812345678",
        "Phone number: 555 1234567",
        "call us at 5551234567",
        "전화 1588-1234",
        "Fax (555)123-4567",
        "TÉL 0123456789",
        "Mobile no. 98765 43210",
        "☎ 22 33 44 55",
    ],
)
def test_other_forms_count_after_a_word_that_announces_them(text):
    assert changed(text) == {"phone": 1}
    bare = re.sub(r"^[^\d(]*", "", text)
    assert not changed(f"There were {bare} of them")


@pytest.mark.parametrize(
    "text",
    """2024-01-02|Tel. 123 456|Tel. 1234 5678 9012 3456 78|12/05/2023|01.02.2024|12:30:45|ISBN 978-0-306-40615-7|ISBN 0-306-40615-2|1234567890|$1,234,567.89
€ 1.234.123.200|3.14159265358|1234-5678-9012-3456|4111 1111 1111 1111|+10 000 000|+200 000 000|2010-2014|250 300 4000|123-45-6789
0.212-555-1234|Mobile: 12/05/2023|Phone 2010-2014|20230405123456|order-212-555-1234|100,000 - 200,000
doi:10.1016/0092-8674(00)81683-9|arXiv:2406.11794|12 345 678|x/212-555-1234/y|#212-555-1234|1 000 000 000|0800-1030
212-555-12345|1212-555-1234|RFC 2616-1234|01 02 03 04 05 06|bond 912828-5550-1234|(1998) 1234-5678""".replace(
        "\n", "|"
    ).split("|"),
)
def test_what_is_no_phone(text):
    assert scrub(text, CONFIG) == (text, {})


@given(
    st.datetimes(),
    st.sampled_from(["%Y-%m-%d", "%d.%m.%Y", "%m/%d/%Y %H:%M:%S", "%Y-%m-%dT%H:%M:%S", "%d-%m-%Y"]),
)
def test_dates_are_kept(moment, form):
    assert not changed(f"Posted on {moment.strftime(form)} by us; fax sent")


@given(st.integers(0, 10**18))
def test_numbers_and_prices_are_kept(number):
    grouped = f"{number:,}"
    for written in (
        str(number),
        grouped,
        grouped.replace(",", "."),
        f"${grouped}.99",
        f"{number / 100:.2f} €",
    ):
        assert not changed(f"it cost {written} or more") or "." in written.replace(".99", "")
    assert not changed(
        f"it cost {number} or {grouped} or ${grouped}.99 or {number // 100}.{number % 100:02d} €"
    )


@given(st.lists(st.integers(0, 9), min_size=12, max_size=12), st.sampled_from(["978", "979"]), st.data())
def test_isbns_are_kept(digits, prefix, data):
    text = "".join(map(str, digits))[:10]
    cuts = sorted(data.draw(st.sets(st.integers(1, 9), min_size=3, max_size=3)))
    parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, 10], strict=True)]
    assert not changed(f"ISBN {prefix}-" + "-".join(parts))


@given(st.text(alphabet=st.sampled_from("0123456789+-(). @a:.电x\n/"), max_size=60))
def test_any_text_keeps_what_is_around(text):
    once, counts = scrub(text, CONFIG)
    assert bool(counts) == (once != text)
    pools = (*CONFIG.email_replacements, *CONFIG.ipv4_replacements, *CONFIG.ipv6_replacements)
    kept = re.split("|".join(map(re.escape, (*pools, *CONFIG.phone_replacements))), once)
    assert len(kept) > sum(counts.values())
    assert re.fullmatch(".*".join(map(re.escape, kept)), text, re.DOTALL)


def test_scrubbing_real_text_twice_changes_nothing(shared_dir):
    total = 0
    for row in rows(shared_dir / "data/text/c4_200.jsonl.gz"):
        once, counts = scrub(row["text"], CONFIG)
        total += sum(counts.values())
        assert scrub(once, CONFIG) == (once, {})
    assert total == 28  # read one by one: 23 telephone numbers, 5 e-mail addresses, none wrong


def test_the_same_address_has_the_same_replacement():
    text, counts = scrub("a@x.org b@x.org a@x.org", CONFIG)
    first, _, third = text.split()
    assert first == third
    assert counts == {"email": 3}
    replaced = {scrub(f"{i}@x.org", CONFIG)[0] for i in range(20)}
    assert replaced == set(CONFIG.email_replacements)


def test_each_kind_can_be_switched_off():
    text = "joe@x.org 93.184.216.34 2a00:1450::5 212-555-1234"
    assert changed(text) == {"email": 1, "ip": 2, "phone": 1}
    assert scrub(text, PiiFilter(emails=False))[1] == {"ip": 2, "phone": 1}
    assert scrub(text, PiiFilter(ips=False))[1] == {"email": 1, "phone": 1}
    assert scrub(text, PiiFilter(phones=False))[1] == {"email": 1, "ip": 2}
    with pytest.raises(ValueError, match="phone_replacements must not be empty"):
        PiiFilter(phone_replacements=())


def test_the_addresses_that_dolmas_tagger_names_are_found(shared_dir):
    """Each span that the oracle marks as an e-mail address with certainty is replaced here, or is none."""
    folder = shared_dir / "data/web/mixer_pairs"
    documents = rows(folder / "documents.jsonl.gz")
    attributes = rows(folder / "attributes_pii.jsonl.gz")
    marked = 0
    for document, row in zip(documents, attributes, strict=True):
        for start, end, score in row["attributes"].get("pii", {}).get("email", []):
            if score >= 0.5 and "@" in (span := document["text"][start:end]):
                marked += 1
                assert span.strip() not in scrub(document["text"], CONFIG)[0]
    assert marked == 3


def test_hostile_texts_take_no_quadratic_time():
    for piece in (
        "0",
        "1.",
        "a@",
        "@",
        "2000:",
        "+1 ",
        "(2",
        "a.",
        "tel 1",
        "0-",
        "1 2-",
        "x.y@z-",
        "9" * 31 + "-",
    ):
        seconds = []
        for repeats in (2_000, 20_000):
            start = time.thread_time()
            scrub(piece * repeats, CONFIG)
            seconds.append(time.thread_time() - start)
        assert seconds[1] < 40 * seconds[0] + 0.05, piece  # quadratic would be 100 times


def test_in_random_bytes_what_is_counted_is_what_changes_and_once_is_enough():
    rng = random.Random(0)
    for _ in range(200):
        text = rng.randbytes(300).decode("latin-1")
        scrubbed, counts = scrub(text, CONFIG)
        assert (scrubbed != text) == bool(counts)
        assert scrub(scrubbed, CONFIG) == (scrubbed, {})
