import pytest

from hf_csm.errors import UserError
from hf_csm.prepare.archive import list_members
from hf_csm.prepare.tabular import read_rows, read_text


def member(folder, name, content):
    (folder / name).write_bytes(content)
    (found,) = list_members([folder])
    return found


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b'\xef\xbb\xbf name ,note\r\nanna,\r\n\r\n Bob ,"one, ""two"""\r\n'),
        ("a.tsv", b'name\tnote\nanna\t\n\nBob\t"one, ""two"""\n'),
        ("a.jsonl", b'{}\n{"name": "anna", "note": null}\n\n{"name": "Bob", "note": "one, \\"two\\""}\n'),
    ],
)
def test_all_formats_give_the_same_rows_and_locations(tmp_path, name, content):
    rows = [(where, row) for where, row in read_rows(member(tmp_path, name, content)) if row]
    assert rows == [
        (f"{tmp_path / name}: row 2", {"name": "anna", "note": ""}),
        (f"{tmp_path / name}: row 4", {"name": "Bob", "note": 'one, "two"'}),
    ]


def test_the_keys_of_a_json_object_are_a_column(tmp_path):
    table = member(tmp_path, "a.json", b'{"x.wav": {"act": 2.5}, "y.wav": {"act": null}}')
    assert [row for _, row in read_rows(table)] == [
        {"FileName": "x.wav", "act": "2.5"},
        {"FileName": "y.wav", "act": ""},
    ]


def test_a_cell_of_several_lines_counts_its_lines(tmp_path):
    table = member(tmp_path, "a.csv", b'name\n"two\nlines"\nanna\n')
    assert [where.rpartition(": ")[2] for where, _ in read_rows(table)] == ["row 3", "row 4"]


def test_a_line_separator_inside_a_json_string_does_not_end_the_line(tmp_path):
    table = member(tmp_path, "a.jsonl", '{"text": "one\u2028two"}\n'.encode())
    assert [row for _, row in read_rows(table)] == [{"text": "one\u2028two"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x,y\n1,2\n1\n", r"after row 2 \(1 cells under 2 columns\)"),
        ("a.csv", b'x,y\n1,"2\n', "unexpected end of data"),
        ("a.csv", b"x, x\n", r"from its first row on \(the column 'x' is there twice\)"),
        ("a.json", b"[]", "not an object of objects"),
        ("a.json", b'{"x": 1}', "'1' is not an object"),
        ("a.jsonl", b'{"x": 1}\n{"x": [1]}\n', r"after row 1 \('x' holds more than one value\)"),
        ("a.jsonl", b"{\n", "from its first row on"),
        ("a.jsonl", b'{"x": "1"}\n{"x": "\\ud83d"}\n', "after row 1 .half a character"),
    ],
)
def test_a_damaged_table_is_an_error_of_two_lines_that_names_it(tmp_path, name, content, message):
    with pytest.raises(UserError, match=rf"{name}: cannot be read .*{message}") as error:
        list(read_rows(member(tmp_path, name, content)))
    assert len(str(error.value).splitlines()) == 2


def test_text_that_is_not_utf_8_is_an_error_that_names_the_byte(tmp_path):
    with pytest.raises(UserError, match=r"a\.txt.* UTF-8.* byte 3\b"):
        read_text(member(tmp_path, "a.txt", b"caf\xe9!"))
