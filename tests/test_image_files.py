"""Which files are images."""

import pytest

from alexnet_jax.data import image_files


def test_files_are_listed_without_system_files_and_loops(tmp_path):
    for name in ("a.png", "sub/b", ".hidden.png", "._a.png", "Thumbs.db", "@eaDir/a.png", "sub/__MACOSX/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    outside = tmp_path.parent / f"{tmp_path.name}_outside"
    outside.mkdir()
    (outside / "c.png").touch()
    (tmp_path / "sub" / "up").symlink_to("..")
    (tmp_path / "sub" / "linked").symlink_to(outside)
    (tmp_path / "again").symlink_to(outside)
    errors: list[OSError] = []
    found = [path.relative_to(tmp_path).as_posix() for path in image_files.files_in(tmp_path, errors.append)]
    assert found == ["a.png", "again/c.png", "sub/b"]
    assert image_files.files_in(tmp_path / "nothing", errors.append) == []
    assert [error.filename for error in errors] == [str(tmp_path / "nothing")]


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a", b"P6\n32 16\n255\n", True),
        ("a.txt", b"P3 people", False),
        ("a.heic", b"", True),
        ("a", b"\xff\xd8\xff\xe0", True),
        ("a", b"\0\0\0\x18ftypisom\0\0\0\0mp42isom", False),
    ],
)
def test_an_image_is_known_by_suffix_or_content(name, data, expected, tmp_path):
    (tmp_path / name).write_bytes(data)
    assert image_files.looks_like_image(tmp_path / name) is expected


def test_a_dangling_link_is_not_an_image(tmp_path):
    (tmp_path / "a").symlink_to("nothing")
    assert not image_files.looks_like_image(tmp_path / "a")
