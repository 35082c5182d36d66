from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emotion.errors import SpecError
from job.spec.strict_yaml import MAX_BYTES, Document, Value, read, scalar_or_flow


def load(text: str | bytes, name: str) -> Document:
    """A document without problems, or all of them at once."""
    document = read(text, name)
    if document.problems:
        raise SpecError(*(f"{name}:{p.line}:{p.column}: {p.text}" for p in document.problems))
    return document


def problems(text: str | bytes) -> tuple[str, ...]:
    with pytest.raises(SpecError) as caught:
        load(text, "s.yaml")
    return caught.value.problems


def same(found: Value, expected: Value) -> bool:
    """Equal and of one type: 1, 1.0 and True are three values."""
    return found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E+3", 1000.0),
        (".5", 0.5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("1.e2", 100.0),
        ("30", 30),
        ("+7", 7),
        ("-7", -7),
        ("010", 10),
        ("08", 8),
        ("0o17", 15),
        ("0x1F", 31),
        ("true", True),
        ("True", True),
        ("TRUE", True),
        ("false", False),
        ("FALSE", False),
        ("null", None),
        ("Null", None),
        ("~", None),
        ("", None),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_a_plain_scalar_follows_the_core_schema(text: str, value: Value) -> None:
    document = load(f"a: {text}\n", "s.yaml").value
    assert isinstance(document, dict)
    assert same(document["a"], value)
    assert same(scalar_or_flow(text, "--set a"), value)


@pytest.mark.parametrize(
    "word",
    ["no", "NO", "on", "off", "yes", "y", "n", "tRUE", "nULL", "2020-01-01", "12:30:45", "1_000", "0b11", "0o8", "0x",
     "+0x1", "1e", "e5", ".", "+", "inf", "nan", "NaN", "٣", "1e5x", "generated:60", "a#b", "C:\\x"],
)  # fmt: skip
def test_other_plain_scalars_are_text(word: str) -> None:
    assert load(f"a: {word}\n", "s.yaml").value == {"a": word}


@pytest.mark.parametrize("text", ["'1e-4'", '"1e-4"', "|-\n  1e-4", ">-\n  1e-4"])
def test_a_quoted_or_block_scalar_is_text(text: str) -> None:
    assert load(f"a: {text}\n", "s.yaml").value == {"a": "1e-4"}


@pytest.mark.parametrize("text", [".nan", ".NaN", ".inf", "-.inf", "+.INF"])
def test_infinity_and_nan_are_refused(text: str) -> None:
    assert problems(f"a: 1\nb: {text}") == (f"s.yaml:2:4: {text} is refused, only finite numbers are allowed",)


@pytest.mark.parametrize(
    "text", ["1" * 5000, "0x" + "f" * 5000, "0" * 5000, "9223372036854775808", "-9223372036854775808", "1e999"]
)
def test_a_number_out_of_range_is_refused(text: str) -> None:
    (problem,) = problems(f"a: {text}")
    assert problem.startswith("s.yaml:1:4: the ")
    assert "allowed are those within" in problem
    assert len(problem) < 200


def test_refused_parts_are_reported_all_at_once_and_in_order() -> None:
    text = """\
a: 1
a: 2
b: &anchor {c: 1, c: 2}
d: *anchor
<<: *anchor
1: x
null: x
? [q]
: x
e: !!str 5
f: [.nan, !tag x]
"""
    assert [problem.split(",")[0] for problem in problems(text)] == [
        "s.yaml:2:1: the key 'a' a second time",
        "s.yaml:3:4: the anchor &anchor",
        "s.yaml:3:19: the key 'c' a second time",
        "s.yaml:4:4: the alias *anchor",
        "s.yaml:5:1: the merge key <<",
        "s.yaml:5:5: the alias *anchor",
        "s.yaml:6:1: 1 as a key",
        "s.yaml:7:1: null as a key",
        "s.yaml:8:3: a list or mapping as a key",
        "s.yaml:10:4: the tag !!str",
        "s.yaml:11:5: .nan is refused",
        "s.yaml:11:11: the tag !tag",
    ]


def test_a_duplicate_key_names_the_position_of_the_first() -> None:
    assert problems("gan:\n  epochs: 1\n  epochs: 2") == (
        "s.yaml:3:3: the key 'epochs' a second time, once is allowed; first at 2:3",
    )


def test_the_same_key_in_two_mappings_is_no_duplicate() -> None:
    assert load("a: {x: 1}\nb: {x: 2}\nc: [{x: 3}, {x: 4}]", "s.yaml").value == {
        "a": {"x": 1},
        "b": {"x": 2},
        "c": [{"x": 3}, {"x": 4}],
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\n---\nb: 2", "s.yaml:2:1: a second document"),
        ("a:\n\t- 1", "s.yaml:2:1: a tab"),
        ("a: b: c", "s.yaml:1:5: a ':' that does not belong here"),
        ("a: 1\nb\n", "s.yaml:3:1: a line without ':'"),
        ("a:\n    b: 1\n  c: 2", "s.yaml:3:3: this does not fit the lines above"),
        ("a: |\tb\n  c", "s.yaml:1:6: not valid YAML: expected a comment or a line break, but found 'b'"),
        ("a: @x", "s.yaml:1:4: found character '@' that may not start a value; put the text in quotes"),
        ("a: [1, 2\nb: 3", "s.yaml:2:2: not valid YAML"),
        ("a: 'x\nb: 1\n", "s.yaml:3:1: not valid YAML"),
        ("a: !x!y 1", "s.yaml:1:4: not valid YAML"),
        ("%YAML 1.1\n---\na: yes", "s.yaml:1:1: a % directive"),
        ("%YAML 1." + "9" * 5000 + "\n---\n", "s.yaml:1:9: not valid YAML"),
        ('a: "\\UFFFFFFFF"', "s.yaml:1:7: not valid YAML"),
        ('a: "\\U00110000"', "s.yaml:1:7: not valid YAML"),
        ('a: "\\ud800"', "s.yaml:1:4: an escape for the character U+D800"),
        ('a: "\\0"', "s.yaml:1:4: an escape for the character U+0000"),
        ('a: "\\e[31m"', "s.yaml:1:4: an escape for the character U+001B"),
        ("a: 1\nb: x\0", "s.yaml:2:5: the invisible character U+0000"),
        ("# a\u2028b: 1", "s.yaml:1:4: the invisible character U+2028"),
        ("a: \udcff", "s.yaml:1:4: the invisible character U+DCFF"),
        (b"a: 1\r\nb: \xff", "s.yaml:2:4: byte 0xff is not UTF-8"),
        ("a: 1".encode("utf-16"), "s.yaml:1:1: the file is UTF-16, expected UTF-8"),
    ],
)
def test_a_syntax_error_is_one_line_with_its_position(text: str | bytes, problem: str) -> None:
    (found,) = problems(text)
    assert found.startswith(problem)
    assert "\n" not in found


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: b\t# c\nd: 1", {"a": "b", "d": 1}),
        ("a: 1\t\nd: 2\t ", {"a": 1, "d": 2}),
        ("a:\tb", {"a": "b"}),
        ("a\t: b", {"a": "b"}),
        ("a: 'b'\t# c\n\t# d\n \t\n\t\nd: \"e\"\t", {"a": "b", "d": "e"}),
        ("a:\t[1,\t2\t]\t# c", {"a": [1, 2]}),
        ("a: {b:\t1\t, c: 2}", {"a": {"b": 1, "c": 2}}),
        ("-\tx\n- \ty\t# c", ["x", "y"]),
        ("a:\t# c\n  b: 1", {"a": {"b": 1}}),
        ("a: b\t\n  c", {"a": "b c"}),
        ("a: |\t# c\n  b\tc\nd: >- \t\n  e\n  f\ng: |2-\t #\t\n   h\n", {"a": "b\tc\n", "d": "e f", "g": " h"}),
        ("---\t# c\na: 1\n...\t", {"a": 1}),
    ],
)
def test_tabs_that_separate_are_read_as_by_yaml_1_2(text: str, value: Value) -> None:
    assert load(text, "s.yaml").value == value


@pytest.mark.parametrize(
    "text", ["a:\n\tb: 1", "a:\n \tb: 1", "\ta: 1", "a: [\n\t1]", "a:\n\t- 1", "-\ta: 1\n  b: 2", "-\t- 1", "a: b\tc"]
)
def test_tabs_that_indent_or_lie_in_text_are_refused(text: str) -> None:
    assert len(problems(text)) == 1


@pytest.mark.parametrize(
    ("text", "place", "character"),
    [
        ("name:\u00a0tiny\ndata: {x: 1}", "1:6", "U+00A0 (NO-BREAK SPACE)"),
        ("a: 1\nname:\u00a0tiny\n\n# x\ndata: {x: 1}", "2:6", "U+00A0 (NO-BREAK SPACE)"),
        ("a:\n\u00a0\u00a0b: 1", "2:1", "U+00A0 (NO-BREAK SPACE)"),
        ("a: 1\u00a0", "1:5", "U+00A0 (NO-BREAK SPACE)"),
        ("a: {b:\u30002}", "1:7", "U+3000 (IDEOGRAPHIC SPACE)"),
        ("a: b\n  c\u200bd", "2:4", "U+200B (ZERO WIDTH SPACE)"),
        ("a\u200b: 1", "1:2", "U+200B (ZERO WIDTH SPACE)"),
        ("a: /x/\u202ey", "1:7", "U+202E (RIGHT-TO-LEFT OVERRIDE)"),
        ("a: 1\n\ufeffb: 2", "2:1", "U+FEFF (ZERO WIDTH NO-BREAK SPACE)"),
        ("a: 1 # x\u2028b: 2", "1:9", "U+2028 (LINE SEPARATOR)"),
        ("a: b\x1b[31m", "1:5", "U+001B (ESCAPE)"),
        ("a: b\tc", "1:5", "U+0009 (TAB)"),
        ("a: \u201cx\u201d", "1:4", "U+201C (LEFT DOUBLE QUOTATION MARK)"),
        ("a: \u201ex\u201c", "1:4", "U+201E (DOUBLE LOW-9 QUOTATION MARK)"),
        ("\u2018a\u2019: x", "1:1", "U+2018 (LEFT SINGLE QUOTATION MARK)"),
        ("a:\n  \u2013 1\n  \u2013 2", "2:3", "U+2013 (EN DASH)"),
        ("a:\n  - 1\n  \u2013 2: 3", "3:3", "U+2013 (EN DASH)"),
        ("a\uff1a1\nb: 2", "1:2", "U+FF1A (FULLWIDTH COLON)"),
        ("a: 1\nb\uff1a2\nc: 3", "2:2", "U+FF1A (FULLWIDTH COLON)"),
    ],
)
def test_a_character_that_deceives_the_eye_is_named_at_its_place(text: str, place: str, character: str) -> None:
    (problem,) = problems(text)
    assert problem.startswith(f"s.yaml:{place}: ")
    assert character in problem
    assert problem.isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "a: Caf\u00e9\u2019s",
        "a: 'x\u00a0\u200by'",
        '"\u201ca": "\u2013 1"',
        "a: 1 # \u00a0\u201c\u202e",
        "# \uff1a\n\u97f3\u4e50: \u6b4c\uff1a1",
        "a: \u2013x",
    ],
)
def test_in_quotes_and_comments_any_character_that_prints_nothing_may_stand_and_in_text_any_letter(text: str) -> None:
    assert load(text, "s.yaml").value is not None


def test_an_error_beside_an_innocent_character_is_still_explained() -> None:
    assert problems('a: "\u2013 x" # \u00a0\nb: c: d') == (
        "s.yaml:2:5: a ':' that does not belong here; check the indentation, and put text that contains ': ' in quotes",
    )
    assert "YAML found in line 2: a ':' that does not belong here" in problems("a: \u6b4c\uff1a1\nb: c: d")[0]


def test_depth_is_limited_and_twenty_thousand_brackets_are_one_error() -> None:
    assert load("[" * 16 + "]" * 16, "s.yaml").value is not None
    deeper = "s.yaml:1:17: nested more than 16 deep, at most that is allowed"
    assert problems("[" * 17 + "]" * 17) == (deeper,)
    assert problems("[" * 20_000) == (deeper,)
    assert problems("- " * 20_000) == ("s.yaml:1:33: nested more than 16 deep, at most that is allowed",)


def test_an_alias_bomb_is_refused_before_it_grows() -> None:
    bomb = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{f'*{a}, ' * 9}*{a}]\n" for a, b in pairwise("abcdefghi"))
    assert len(problems(bomb)) == 9 + 80
    assert read(bomb, "s.yaml").value == {"a": ["x", "x"], **{name: [None] * 10 for name in "bcdefghi"}}


def test_size_is_checked_in_bytes_before_anything_is_parsed() -> None:
    assert load(b"#" * MAX_BYTES, "s.yaml").value is None
    too_long = "s.yaml:1:1: more than 256 KiB of YAML, at most that is allowed"
    assert problems(b"[" * (MAX_BYTES + 1)) == (too_long,)
    assert problems("é" * (MAX_BYTES // 2 + 1)) == (too_long,)


def test_a_byte_order_mark_and_windows_line_ends_are_accepted() -> None:
    document = load(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n", "s.yaml")
    assert document.value == {"a": 1, "b": 2}
    assert document.position(("b",)) == (2, 1)
    assert load("\ufeffa: 1", "s.yaml").position(("a",)) == (1, 1)


def test_positions_are_those_of_keys_and_items_and_fall_back_to_the_parent() -> None:
    document = load("a: 1\nb:\n  c:\n    - x\n    - [y, {d: 1}]\n", "s.yaml")
    assert document.position(("a",)) == (1, 1)
    assert document.position(("b", "c")) == (3, 3)
    assert document.position(("b", "c", 0)) == (4, 7)
    assert document.position(("b", "c", 1, 0)) == (5, 8)
    assert document.position(("b", "c", 1, 1, "d")) == (5, 12)
    assert document.position(("b", "z", "y")) == (2, 1)
    assert document.position(("z",)) == (1, 1)


def test_refused_values_are_left_out_and_their_paths_reported_as_unknown() -> None:
    document = read("a: .inf\nb: 1\nb: 2\nc: *x\n1: {b: 5}", "s.yaml")
    assert document.value == {"b": 1}
    assert [problem.hides for problem in document.problems] == [("a",), None, ("c",), None]
    assert document.position(("b",)) == (2, 1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2),
        ("[224,224]", [224, 224]),
        ("{epochs: 2, width: 8}", {"epochs": 2, "width": 8}),
        ("null", None),
        ("generated:60", "generated:60"),
        ("/data/deam", "/data/deam"),
        ("no", "no"),
    ],
)
def test_a_value_from_the_command_line_follows_the_same_rules(text: str, value: Value) -> None:
    assert same(scalar_or_flow(text, "--set a"), value)


@pytest.mark.parametrize(
    "text", ["a: b", "- 1", "[1", ".nan", "*x", "!!str 1", "{a: 1, a: 2}", "1\n--- 2", "\udcff", "1" * 5000, "[" * 99]
)
def test_a_bad_value_from_the_command_line_is_named_without_a_position(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        scalar_or_flow(text, "--set a.b")
    (problem,) = caught.value.problems
    assert problem.startswith("--set a.b: ")


PIECES = ["a", "b:", ": ", "- ", "[", "]", "{", "}", ",", "?", "&a ", "*a", "!!str ", "!", "|\n", ">", "'", '"', "#",
          "\\U", "%YAML 1.2\n", "---", "...", "\n", "\n  ", "\t", "<<", "~", ".inf", "1e999", "0x", "\\", "@", "\0",
          "\x85", "\u2028", "\ufeff", "\ud800", "é", "FFFFFFFF", "true", "9" * 30]  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(st.text(max_size=60), st.binary(max_size=60), st.lists(st.sampled_from(PIECES)).map("".join)))
def test_any_input_gives_a_value_or_a_spec_error(text: str | bytes) -> None:
    refused: list[str] = []
    try:
        load(text, "s.yaml")
    except SpecError as error:
        refused.extend(error.problems)
    try:
        scalar_or_flow(text if isinstance(text, str) else text.decode("latin-1"), "s.yaml")
    except SpecError as error:
        refused.extend(error.problems)
    assert all(problem.startswith("s.yaml:") and "\n" not in problem for problem in refused)


@pytest.mark.parametrize(
    "text", ["{\ta:\t1\t,\tb:\t[2,\t3]\t}", "{\n\t'a': 1,\n\t\"b\": [\n\t\t2,\n\t\t3\n\t]\n}\n", "a: 1\nb: [\t2\t,\t3\t]\t# c\n"]
)
def test_tabs_separate_tokens_within_brackets(text: str) -> None:
    assert read(text, "x.yaml").value == {"a": 1, "b": [2, 3]}


@pytest.mark.parametrize("sign", ["\u3164", "\u2800", "\u034f", "\uffa0"])
def test_a_character_that_counts_as_printable_and_is_not_seen_is_named(sign: str) -> None:
    (problem,) = read(f"a: 1\nb:{sign}2: 3\n", "x.yaml").problems
    assert (problem.line, problem.column) == (2, 3)
    assert f"U+{ord(sign):04X}" in problem.text


def test_utf_32_is_called_so() -> None:
    with pytest.raises(SpecError, match="the file is UTF-32"):
        read("a: 1".encode("utf-32"), "x.yaml")
