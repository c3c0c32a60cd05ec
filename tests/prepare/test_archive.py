import zipfile

import pytest

from hf_csm.errors import UserError
from hf_csm.prepare.archive import list_members


def write_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_files_and_zip_members_are_read_without_extraction(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.wav").write_bytes(b"1")
    write_zip(tmp_path / "two.zip", {"Actor_01/": b"", "Actor_01/two.wav": b"22"})
    before = sorted(tmp_path.rglob("*"))
    members = list_members([tmp_path])
    assert {m.file_name: (m.read(), m.num_bytes, m.is_zipped) for m in members} == {
        "one.wav": (b"1", 1, False),
        "two.wav": (b"22", 2, True),
    }
    assert sorted(tmp_path.rglob("*")) == before


def test_hidden_and_system_files_are_not_listed(tmp_path):
    for name in (".DS_Store", "._x.wav", "Thumbs.db", "x.wav"):
        (tmp_path / name).write_bytes(b"x")
    write_zip(tmp_path / "z.zip", {"__MACOSX/Actor_01/._y.wav": b"y", "y.wav": b"y"})
    assert [member.file_name for member in list_members([tmp_path])] == ["x.wav", "y.wav"]


def test_a_link_to_a_parent_folder_terminates(tmp_path):
    (tmp_path / "x.wav").write_bytes(b"x")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert len(list_members([tmp_path])) == 1


@pytest.mark.parametrize("name", ["../evil.wav", "a/../../evil.wav", "/etc/evil.wav", "..\\evil.wav", "C:/evil.wav"])
def test_a_zip_member_that_points_outside_is_refused(tmp_path, name):
    path = write_zip(tmp_path / "z.zip", {name: b"x", "good.wav": b"x"})
    with pytest.raises(UserError, match="points outside"):
        list_members([path])


def test_a_truncated_zip_is_an_error_that_names_it(tmp_path):
    path = write_zip(tmp_path / "z.zip", {"x.wav": bytes(100_000)})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"z\.zip.*truncated"):
        list_members([path])


def test_a_damaged_member_is_an_error_that_names_it(tmp_path):
    path = write_zip(tmp_path / "z.zip", {"x.wav": bytes(range(256)) * 40})
    content = bytearray(path.read_bytes())
    content[60:80] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.wav"):
        list_members([path])[0].read()


def test_missing_and_empty_sources_are_errors(tmp_path):
    with pytest.raises(UserError, match="no such"):
        list_members([tmp_path / "gone"])
    with pytest.raises(UserError, match="no files"):
        list_members([tmp_path])
    with pytest.raises(UserError, match="no files"):
        list_members([write_zip(tmp_path / "z.zip", {"Actor_01/": b""})])


def test_a_file_gone_after_listing_is_an_error(tmp_path):
    (tmp_path / "x.wav").write_bytes(b"x")
    (member,) = list_members([tmp_path])
    (tmp_path / "x.wav").unlink()
    with pytest.raises(UserError, match=r"x\.wav"):
        member.read()
