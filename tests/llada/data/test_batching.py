from llada.data.batching import batches


def test_a_batch_ends_with_the_item_that_fills_it():
    assert list(batches(["aa", "b", "cccc", "d"], len, full=3)) == [["aa", "b"], ["cccc"], ["d"]]
    assert list(batches(["", ""], len, full=3)) == [["", ""]]
    assert list(batches([], len)) == []
