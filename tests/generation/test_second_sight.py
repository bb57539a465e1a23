from ragkit.generation.second_sight import SecondSight


def test_what_was_asked_for_long_ago_is_forgotten():
    kept = SecondSight(2)
    assert kept.take(0, str, print) is None
    for number in range(1, 65):
        kept.take(number, str, print)
    assert kept.take(0, str, print) is None
    assert kept.take(64, str, print) == ""
