"""Files appear whole or not at all."""

import pytest

from userllm.whole_file import whole, write_text


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    file = tmp_path / "page.md"
    write_text(file, "Über alles\n")

    def fail() -> None:
        with whole(file) as partial:
            partial.write_text("half")
            assert file.read_text(encoding="utf-8") == "Über alles\n"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert file.read_text(encoding="utf-8") == "Über alles\n"
    assert list(tmp_path.iterdir()) == [file]


def test_the_new_takes_the_place_of_the_old(tmp_path):
    file = tmp_path / "page.md"
    write_text(file, "old")
    write_text(file, "new")
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]
