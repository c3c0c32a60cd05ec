import os

import pytest

from hf_csm.errors import UserError
from hf_csm.files import read_json, read_yaml, replaced_file, write_text_atomic


def test_an_object_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1]}')
    (tmp_path / "a.yaml").write_text("a: [1]\n")
    assert read_json(tmp_path / "a.json") == read_yaml(tmp_path / "a.yaml") == {"a": [1]}
    (tmp_path / "empty.yaml").write_text("")
    assert read_yaml(tmp_path / "empty.yaml") == {}


@pytest.mark.parametrize("read", [read_json, read_yaml])
@pytest.mark.parametrize(
    ("content", "match"),
    [(None, "no such file"), (b"[1]", "not a"), (b"{", "not valid"), (b"\xff\xfe", "not UTF-8"), ("folder", "read")],
)
def test_an_unreadable_file_is_a_two_line_error_with_path_and_remedy(tmp_path, read, content, match):
    path = tmp_path / "a"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=match) as caught:
        read(path, remedy="Export it again.")
    assert str(path) in caught.value.problem and "\n" not in caught.value.problem
    assert caught.value.remedy == "Export it again."


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text_atomic(path, "old ä")
    with pytest.raises(KeyboardInterrupt), replaced_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text(encoding="utf-8") == "old ä"
    write_text_atomic(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["a.txt"]


def test_two_writers_of_a_file_do_not_meet(tmp_path):
    with replaced_file(tmp_path / "a") as one, replaced_file(tmp_path / "a") as two:
        assert one != two
        one.write_text("1")
        two.write_text("2")
    assert (tmp_path / "a").read_text() == "1"
