from llada.data.document import Document, dialogue
from llada.data.tokens.splits import SPLITS, split_of


def test_the_share_is_kept_and_the_seed_changes_it():
    documents = [Document(f"text {number}") for number in range(2000)]
    splits = [split_of(document, 0.1, seed=0) for document in documents]
    assert 150 < splits.count("validation") < 250
    assert set(splits) == set(SPLITS)
    assert splits != [split_of(document, 0.1, seed=1) for document in documents]
    assert {split_of(document, 0.0, seed=0) for document in documents} == {"train"}


def test_answers_to_one_question_stay_together():
    for number in range(50):
        question = {"role": "user", "content": f"What is {number}?"}
        asked = [{"role": "system", "content": "Be kind."}, question, {"role": "assistant", "content": "A"}]
        again = [question, {"role": "assistant", "content": "B"}, {"role": "user", "content": "Why?"}]
        splits = {split_of(dialogue(messages), 0.5, 0) for messages in (asked, again)}
        assert splits == {split_of(Document(question["content"]), 0.5, 0)}
