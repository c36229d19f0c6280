import pytest

from hybrid_jax.checks import check_boolean, check_choice, check_integer, check_number


@pytest.mark.parametrize("value", [0, 11, 1.0, True, "3", None, float("nan")])
def test_an_integer_outside_its_bounds_or_of_another_type_is_refused(value):
    with pytest.raises(ValueError, match=r"--rows must be an integer at least 1 and at most 10, got "):
        check_integer("--rows", value, minimum=1, maximum=10)


@pytest.mark.parametrize("value", [0.0, -1, 1.5, float("nan"), float("inf"), "0.5", True, None])
def test_a_number_outside_its_bounds_or_of_another_type_is_refused(value):
    with pytest.raises(ValueError, match=r"phase.clip must be a number above 0 and at most 1, got "):
        check_number("phase.clip", value, above=0, maximum=1)
    with pytest.raises(ValueError, match="below 1"):
        check_number("x", 1, below=1)


def test_bounds_are_inclusive_where_they_say_so():
    assert check_integer("x", 1, minimum=1) == 1 and check_integer("x", 10, maximum=10) == 10
    assert check_number("x", 1, minimum=1, maximum=1) == 1.0


@pytest.mark.parametrize("value", ["false", 0, None])
def test_only_true_and_false_are_booleans(value):
    assert check_boolean("x", True) is True and check_boolean("x", False) is False
    with pytest.raises(ValueError, match="x must be true or false"):
        check_boolean("x", value)


@pytest.mark.parametrize("value", ["c", None, ["a"]])
def test_a_choice_is_one_of_the_names(value):
    assert check_choice("x", "a", ("a", "b")) == "a"
    with pytest.raises(ValueError, match="x must be one of 'a', 'b', got"):
        check_choice("x", value, ("a", "b"))
