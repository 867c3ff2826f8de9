import pytest

from llada.data.tokens.mixture import SourceShare, mixture_epochs

TOKENS = {"web": 1000, "code": 100}


@pytest.mark.parametrize(
    ("sources", "epochs"),
    [
        ([SourceShare("web"), SourceShare("code", epochs=3.0)], {"web": 1.0, "code": 3.0}),
        ([SourceShare("web", max_tokens=250), SourceShare("code")], {"web": 0.25, "code": 1.0}),
        # The largest mixture in which code is half and comes at most once: 100 tokens of each.
        ([SourceShare("web", 0.5), SourceShare("code", 0.5)], {"web": 0.1, "code": 1.0}),
        ([SourceShare("web", 3.0), SourceShare("code", 1.0, epochs=2.0)], {"web": 0.6, "code": 2.0}),
        (
            [SourceShare("web", 1.0), SourceShare("code", 1.0), SourceShare("empty", 8.0)],
            {"web": 0.1, "code": 1.0},
        ),
    ],
)
def test_passes_over_each_source(sources, epochs):
    assert mixture_epochs(sources, TOKENS) == pytest.approx(epochs)
