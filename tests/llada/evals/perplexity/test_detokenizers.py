"""Detokenisers on what is easily undone wrongly. The expected texts were made by MDLM's own functions."""

from __future__ import annotations

import pytest

from llada.evals.perplexity import detokenizers
from llada.evals.perplexity.detokenizers import Detokenizer

CASES: list[tuple[Detokenizer, str, str]] = [
    (detokenizers.wikitext, " = Robert <unk> = \n", " = Robert <unk> =\n"),
    (
        detokenizers.wikitext,
        " The \" <unk> ' s \" ship ( SMS Zrínyi ) cost 1 @,@ 200 @.@ 5 marks ; the crew 's pay was half @-@ pay . \n",
        " The \"<unk>'s\" ship (SMS Zrínyi) cost 1,200.5 marks; the crew's pay was half-pay.\n",
    ),
    (
        detokenizers.wikitext,
        " = = = Players ' wages : 5 ° C = = = \n N 1 [ 2 ] { x } /' 5/ ",
        " === Players'wages: 5°C ===\nN 1 [2] {x} /'[0-9]/ ",
    ),
    (
        detokenizers.wikitext,
        "it 's the dogs ' bone , isn 't it ? ' yes ' ! ",
        "it's the dogs' bone, isn 't it?' yes'! ",
    ),
    (
        detokenizers.ptb,
        "the company 's $ N N N billion debt does n't include # N \\/ share the traders ' view <unk> ",
        "the company's $1 1 1 billion debt doesn't include #1 / share the traders' view ? ",
    ),
    (
        detokenizers.lm1b,
        '" He said , " it \'s 5 / 6 at http : / / x.com ( or so ) . ',
        '"He said," it\'s 5/6 at http://x.com (or so) . ',
    ),
    (
        detokenizers.lm1b,
        "We ' ve £ 5 [ maybe ] ; is it $ 6 : yes ! Really ?",
        "We ' ve £5 [maybe]; is it $6: yes! Really?",
    ),
    (detokenizers.lm1b, "The end of it . Then more .", "The end of it. Then more."),
    (
        detokenizers.lm1b,
        'A U.S. firm ( see ( this ) one ) said " no " . ',
        'A U.S. firm ( see (this) one ) said "no" . ',
    ),
    (detokenizers.lambada, "  “ why ? ” she said , and left .\n", '\n" why ? " she said , and left .'),
    (
        detokenizers.scientific_papers,
        "we use @xmath0 ( see fig . [ 1 ] ) , i.e. half @-@ integer spins . the end .\n",
        "we use @xmath0 (see fig. [1]), i.e. half-integer spins. the end.\n",
    ),
    (detokenizers.as_it_is, " a ' b ' ( c ) . ", " a ' b ' ( c ) . "),
]


@pytest.mark.parametrize(("detokenize", "text", "expected"), CASES)
def test_texts_are_those_of_the_published_code(detokenize: Detokenizer, text: str, expected: str) -> None:
    assert detokenize(text) == expected
