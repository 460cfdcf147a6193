from fedsb.data.seeds import derived_seed, generator


def test_seed_is_the_same_in_every_process_and_release() -> None:
    assert derived_seed(0, "draw", "hospital-a", 3) == 102199955334807597769480573848759965455


def test_seed_depends_on_each_part_and_on_where_one_part_ends() -> None:
    assert len({derived_seed(*p) for p in [(1, "a"), (2, "a"), (1, "b"), ("a", 1), ("1", "a"), (1, "a", "")]}) == 6
    assert derived_seed("ab", "c") != derived_seed("a", "bc")


def test_generator_starts_afresh_each_time() -> None:
    assert generator(1, "x").integers(1 << 40) == generator(1, "x").integers(1 << 40)
    assert generator(1, "x").integers(1 << 40) != generator(1, "y").integers(1 << 40)
