import csv
import shutil
import zipfile
from pathlib import Path

import pytest

from userllm.cli import main
from userllm.data import Dataset
from userllm.data.sources.fetch import cache_folder
from userllm.data.sources.movielens import prepare_movielens
from userllm.errors import UserError

TINY_FINGERPRINT = "a9b9415843444df3dca10b80915e13513647b4345a72c53dc2ed652a8ea579f5"
"""Of the tiny release; changes only where the rule of the fingerprint does, and then every published number moves."""


OWN_CACHE = cache_folder()
"""Where the real releases are, if anywhere: tests have a cache of their own, but this is read before it is theirs."""


def edit(file: Path, line: int, new: str, encoding: str = "latin-1") -> None:
    """Replace a line (from 1) of a file, keeping every other byte."""
    lines = file.read_bytes().decode(encoding).split("\n")
    lines[line - 1] = new
    file.write_bytes("\n".join(lines).encode(encoding))


def test_every_format_gives_the_same_dataset(any_release, tmp_path):
    dataset = prepare_movielens(any_release, tmp_path / "out")
    assert dataset.card.fingerprint == TINY_FINGERPRINT
    assert (dataset.num_users, dataset.num_items, dataset.num_events) == (2, 5, 7)
    assert dataset.items["title"].to_list() == [
        "Toy Story (1995)",
        "Misérables, Les (1995)",
        'City "of" Lost Children, The (1995)',
        "Land Before Time III: The Great Giving (1995) (V)",
        "Seven: (Se7en) (1996)",
    ]
    assert dataset.items["year"].to_list() == [1995, 1995, 1995, 1995, 1996]
    assert dataset.items["genres"].to_list()[1] == ["Drama", "Film-Noir"]
    assert dataset.items["genres"].to_list()[4] == []
    assert [user.removeprefix("1m_") for user in dataset.user_ids] == ["30", "4"]


def test_events_at_one_time_keep_the_row_order(any_release, tmp_path):
    dataset = prepare_movielens(any_release, tmp_path / "out")
    titles = dataset.items["title"].to_list()
    first = [titles[row][:4] for row in dataset.events["item"][: dataset.offsets[1]]]
    second = [titles[row][:4] for row in dataset.events["item"][dataset.offsets[1] :]]
    assert first == ["Toy ", "City", "Misé", "Land"]
    assert second == ["Toy ", "Land", "Misé"]


def test_a_zip_equals_its_folder(any_release, tmp_path):
    archive = tmp_path / "release.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for part in any_release.iterdir():
            file.write(part, f"ml-xx/{part.name}")
            file.writestr(f"__MACOSX/ml-xx/._{part.name}", b"resource fork")
    from_zip = prepare_movielens(archive, tmp_path / "zipped")
    from_folder = prepare_movielens(any_release, tmp_path / "plain")
    assert from_zip.card.fingerprint == from_folder.card.fingerprint
    assert from_zip.items.equals(from_folder.items)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plain", "raw", "release.zip", "zipped"]


def test_blank_lines_a_missing_last_newline_and_crlf_do_not_matter(release, tmp_path):
    folder = release("dat")
    ratings = folder / "ratings.dat"
    wanted = prepare_movielens(folder, tmp_path / "out").card.fingerprint
    ratings.write_bytes(ratings.read_bytes().rstrip(b"\n").replace(b"\n", b"\r\n\r\n"))
    assert prepare_movielens(folder, tmp_path / "out").card.fingerprint == wanted


BAD_RATINGS = [
    ("dat", "ratings.dat", 3, "30::2::x::1000", "rating is 'x', not a number"),
    ("dat", "ratings.dat", 7, "30::9::::1000", "rating is missing"),
    ("dat", "ratings.dat", 1, "30::7::4", "3 fields, expected 4 (user, item, rating, timestamp)"),
    ("dat", "ratings.dat", 5, "4::9::2", "3 fields, expected 4 (user, item, rating, timestamp)"),
    ("dat", "ratings.dat", 5, "4::9::2::2000::1", "5 fields, expected 4 (user, item, rating, timestamp)"),
    ("dat", "ratings.dat", 2, "4:1:5:2000", "user is '4:1:5:2000', not a whole number"),
    ("dat", "ratings.dat", 2, "4::1::nan::2000", "rating is 'nan', not a number"),
    ("dat", "ratings.dat", 6, "4::77::4::2000", "item 77 is not in the catalogue {folder}/movies.dat"),
    ("100k", "u.data", 4, "30\t1\t1\tmonday", "timestamp is 'monday', not a whole number"),
    ("100k", "u.data", 7, "\t9\t5\t1000", "user is missing"),
    ("csv", "ratings.csv", 2, "30,7,,1000\r", "rating is missing"),
    ("csv", "ratings.csv", 8, "30,9,five,1000\r", "rating is 'five', not a number"),
    ("csv", "ratings.csv", 4, "30,5,3,1000\r", "item 5 is not in the catalogue {folder}/movies.csv"),
    (
        "recbole-100k",
        "ml-100k.inter",
        3,
        "4\t1\t5",
        "3 fields, expected 4 (user_id, item_id, rating, timestamp)",
    ),
    ("recbole-100k", "ml-100k.inter", 3, "4\t1\t\t5", "rating is missing"),
    (
        "recbole-1m",
        "ml-1m.inter",
        3,
        "1m_4\tNo Such Film\t5\t2000\r",
        "item No Such Film is not in the catalogue",
    ),
]


@pytest.mark.parametrize(("kind", "name", "line", "text", "problem"), BAD_RATINGS)
def test_a_bad_ratings_line_is_named(kind, name, line, text, problem, release, tmp_path):
    folder = release(kind)
    edit(folder / name, line, text)
    with pytest.raises(UserError) as caught:
        prepare_movielens(folder, tmp_path / "out")
    message = str(caught.value)
    assert message.startswith(f"{folder / name} line {line}: {problem.format(folder=folder)}")
    assert message.endswith("; mend or remove that line and prepare again")
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


def test_the_line_is_right_after_blank_lines(release, tmp_path):
    folder = release("dat")
    edit(folder / "ratings.dat", 2, "\n\n4::77::5::2000")
    with pytest.raises(UserError, match=r"ratings.dat line 4: item 77 is not in"):
        prepare_movielens(folder, tmp_path / "out")


BAD_MOVIES = [
    ("100k", "u.item", 2, "2|Les|1995", "3 fields, expected 24"),
    ("dat", "movies.dat", 3, "7::City", "2 fields, expected 3 (MovieID, Title, Genres)"),
    ("dat", "movies.dat", 3, "7::::Drama", "the title is missing"),
    ("dat", "movies.dat", 3, "::City::Drama", "the id is missing"),
    ("dat", "movies.dat", 3, "x7::City::Drama", "the id is 'x7', not a whole number"),
    ("dat", "movies.dat", 3, "2::City::Drama", "item 2 is already on line 2"),
    ("csv", "movies.csv", 4, "7,City\r", "2 fields, expected 3 (movieId, title, genres)"),
    ("recbole-1m", "ml-1m.item", 2, "Toy Story (1995)\tToy Story\r", "2 fields, expected 4"),
]


@pytest.mark.parametrize(("kind", "name", "line", "text", "problem"), BAD_MOVIES)
def test_a_bad_catalogue_line_is_named(kind, name, line, text, problem, release, tmp_path):
    folder = release(kind)
    edit(folder / name, line, text)
    with pytest.raises(UserError) as caught:
        prepare_movielens(folder, tmp_path / "out")
    assert str(caught.value).startswith(f"{folder / name} line {line}: {problem}")
    assert not (tmp_path / "out").exists()


def test_an_unclosed_quote_in_the_catalogue(release, tmp_path):
    folder = release("csv")
    edit(folder / "movies.csv", 3, '2,"Misérables, Les (1995),Drama', "utf-8")
    with pytest.raises(UserError, match=r"movies.csv line \d+: "):
        prepare_movielens(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "ratings", "movies"), [("100k", "u.data", "u.item"), ("recbole-1m", "ml-1m.inter", "ml-1m.item")]
)
def test_missing_and_empty_files(kind, ratings, movies, release, tmp_path):
    folder = release(kind)
    whole = (folder / movies).read_bytes()
    header = whole.splitlines(keepends=True)[0] if "item" in movies and kind != "100k" else b""
    (folder / movies).write_bytes(header)
    with pytest.raises(UserError, match=f"{movies}: the catalogue is empty"):
        prepare_movielens(folder, tmp_path / "out")
    (folder / movies).write_bytes(whole)
    (folder / ratings).write_bytes(
        (folder / ratings).read_bytes().splitlines(keepends=True)[0] if header else b""
    )
    with pytest.raises(UserError, match=f"{ratings}: holds no events"):
        prepare_movielens(folder, tmp_path / "out")
    (folder / movies).unlink()
    with pytest.raises(UserError, match=r"is there, \S+ is missing; give a complete copy"):
        prepare_movielens(folder, tmp_path / "out")
    (folder / ratings).unlink()
    with pytest.raises(UserError, match=r"no MovieLens release in it; expected u\.data with u\.item, "):
        prepare_movielens(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_releases_are_not_mixed(release, tmp_path):
    """Ratings and catalogue come from one folder, and nobody has to guess from which."""
    folder = tmp_path / "both"
    for place in ("a", "b"):
        shutil.copytree(release("dat"), folder / place)
        (tmp_path / "raw-dat").rename(tmp_path / f"raw-{place}")
    shutil.copytree(folder / "b", folder / "a" / "deeper")
    with pytest.raises(UserError, match=r"several releases in it, with a/ratings\.dat and b/ratings\.dat"):
        prepare_movielens(folder, tmp_path / "out")
    (folder / "a" / "movies.dat").unlink()
    assert prepare_movielens(folder, tmp_path / "out").card.fingerprint == TINY_FINGERPRINT  # all of b
    shutil.rmtree(folder / "a" / "deeper")
    (folder / "b" / "ratings.dat").unlink()
    with pytest.raises(
        UserError, match=r"a/ratings\.dat is there, movies\.dat is missing; give a complete copy"
    ):
        prepare_movielens(folder, tmp_path / "out")


def test_a_genre_that_is_named_twice_counts_once(release, tmp_path):
    folder = release("dat")
    edit(folder / "movies.dat", 1, "1::Toy Story (1995)::Comedy|Animation|Comedy")
    assert prepare_movielens(folder, tmp_path / "out").items["genres"].to_list()[0] == ["Comedy", "Animation"]


def test_a_truncated_zip(release, tmp_path):
    folder = release("dat")
    archive = tmp_path / "ml-1m.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for part in folder.iterdir():
            file.write(part, f"ml-1m/{part.name}")
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"ml-1m\.zip: truncated or damaged zip .*download it again"):
        prepare_movielens(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_zip_with_a_flipped_byte(release, tmp_path):
    folder = release("dat")
    archive = tmp_path / "ml-1m.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for part in folder.iterdir():
            file.write(part, f"ml-1m/{part.name}")
    archive.write_bytes(archive.read_bytes().replace(b"30::2::3::1000", b"30::2::5::1000"))
    with pytest.raises(UserError, match=r"ml-1m\.zip: truncated or damaged zip .*CRC"):
        prepare_movielens(archive, tmp_path / "out")


def test_a_path_that_is_no_release(tmp_path):
    with pytest.raises(UserError, match="no such folder or zip"):
        prepare_movielens(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "ratings.txt").write_text("1 2 3 4")
    with pytest.raises(UserError, match="neither a folder nor a zip"):
        prepare_movielens(tmp_path / "ratings.txt", tmp_path / "out")
    with pytest.raises(UserError, match="give your copy of the release with --path"):
        prepare_movielens(None, tmp_path / "out", "movielens-20m")


def test_other_folders_are_not_replaced(any_release, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is no prepared dataset; choose another folder"):
        prepare_movielens(any_release, out)
    assert (out / "thesis.tex").read_text() == "years of work"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "counts", "rated", "fingerprint"),
    [
        ("movielens-1m", (6040, 3883, 1_000_209), 3706, "c221a94b35fd"),
        ("movielens-100k", (943, 1682, 100_000), 1682, "9299b4d2c1df"),
    ],
)
def test_the_real_release(name, counts, rated, fingerprint, tmp_path, monkeypatch):
    monkeypatch.setenv("USERLLM_CACHE", str(OWN_CACHE))
    if not (cache_folder() / name).is_dir():
        pytest.skip(f"{name} is not in the cache; `userllm data prepare {name}` puts it there")
    dataset = prepare_movielens(None, tmp_path / "out", name)
    assert (dataset.num_users, dataset.num_items, dataset.num_events) == counts
    assert len(set(dataset.events["item"].tolist())) == rated
    assert dataset.card.fingerprint.startswith(fingerprint)
    assert Dataset.open(dataset.folder).card == dataset.card


def test_a_folder_as_movielens_20m_is_published(release, tmp_path, capsys):
    """Its other files are in nobody's way, and there is nothing to say but where it is."""
    folder = release("csv")
    for name in ("tags.csv", "links.csv", "genome-scores.csv", "genome-tags.csv", "README.txt"):
        (folder / name).write_text("userId,movieId,tag,timestamp\n")
    assert main(["data", "prepare", "movielens", "--path", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert TINY_FINGERPRINT in capsys.readouterr().out


@pytest.mark.slow  # a million ratings, three times
def test_the_real_release_in_the_original_formats(tmp_path):
    """RecBole's copy of MovieLens-1M, written as GroupLens wrote 1M and as it wrote 20M: one fingerprint."""
    cached = OWN_CACHE / "movielens-1m"
    if not (cached / "ml-1m.inter").is_file():
        pytest.skip("movielens-1m is not in the cache; `userllm data prepare movielens-1m` puts it there")
    lines = (cached / "ml-1m.item").read_text(encoding="utf-8").splitlines()[1:]
    movies = [line.split("\t") for line in lines]
    number = {movie[0]: 1 + n for n, movie in enumerate(movies)}
    ratings = [
        line.split("\t") for line in (cached / "ml-1m.inter").read_text(encoding="utf-8").splitlines()[1:]
    ]
    dat, table = tmp_path / "dat", tmp_path / "csv"
    dat.mkdir()
    table.mkdir()
    genres = {movie[0]: "|".join(movie[3].split()) for movie in movies}
    about = [f"{number[title]}::{title}::{genres[title]}\n" for title in number]
    (dat / "movies.dat").write_bytes("".join(about).encode("latin-1"))
    with open(table / "movies.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["movieId", "title", "genres"])
        writer.writerows([number[title], title, genres[title]] for title in number)
    rows = [
        (user.removeprefix("1m_"), number[title], rating, time.removesuffix(".0"))
        for user, title, rating, time in ratings
    ]
    (dat / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in rows))
    header = "userId,movieId,rating,timestamp\n"
    (table / "ratings.csv").write_text(header + "".join(",".join(map(str, row)) + "\n" for row in rows))
    for folder in (cached, dat, table):
        dataset = prepare_movielens(folder, tmp_path / "out")
        assert dataset.card.fingerprint.startswith("c221a94b35fd")
        assert (dataset.num_users, dataset.num_items, dataset.num_events) == (6040, 3883, 1_000_209)
