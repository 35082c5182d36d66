import re

from emotion import errors


def test_the_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    assert errors.__doc__ is not None
    written = re.findall(r"(\w+) +(\d\d) +(yes|no)\b", errors.__doc__)
    found = [
        (name, str(kind.exit_code), "yes" if kind.retry_helps else "no")
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.EmotionError | errors.Interrupted)
    ]
    assert sorted(written) == sorted(found)
