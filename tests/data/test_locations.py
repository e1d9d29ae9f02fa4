"""From data.path to files, and what Hive folders say about their rows."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from entrypoint.data.locations import WHOLE, find_files, partitions_of
from entrypoint.errors import DataError
from tests.data.traces import contents, drop_column, group, prepared, row, write

Tokenizer = PreTrainedTokenizerBase


@pytest.fixture
def tree(lake: Path) -> Path:
    for name in ("a.parquet", "deep/er/b.PARQUET", "deep/c.pq", "_temporary/d.parquet", "_SUCCESS", ".a.parquet.crc"):
        write(lake / name, group(name, 0.9, 0.1))
    (lake / "notes.txt").write_text("not a trace")
    return lake


def names(lake: Path, *location: object) -> list[str]:
    paths = location[0] if len(location) == 1 else list(location)
    return [os.path.relpath(file.path, lake) for file in find_files(paths)]


def test_a_folder_at_any_depth_without_hidden_and_other_files(tree: Path) -> None:
    expected = ["a.parquet", "deep/c.pq", "deep/er/b.PARQUET"]
    assert names(tree, str(tree)) == names(tree, str(tree) + "/") == names(tree, tree) == expected
    assert names(tree, f"file://{tree}") == expected


def test_a_file_globs_and_lists(tree: Path) -> None:
    assert names(tree, f"{tree}/a.parquet") == ["a.parquet"]
    assert names(tree, f"{tree}/*/*.pq") == ["deep/c.pq"]
    assert names(tree, f"{tree}/**/*.PARQUET") == ["deep/er/b.PARQUET"]
    assert names(tree, f"{tree}/de*") == ["deep/c.pq", "deep/er/b.PARQUET"]
    assert names(tree, f"{tree}/deep", f"{tree}/deep/c.pq", f"{tree}/a.parquet") == [
        "a.parquet",
        "deep/c.pq",
        "deep/er/b.PARQUET",
    ]


def test_what_is_named_outright_counts_whatever_its_name(tree: Path, lake: Path) -> None:
    plain = write(lake / "part-00000", group("p", 0.9, 0.1))
    assert names(tree, str(plain)) == ["part-00000"]
    assert names(tree, f"{tree}/_temporary") == ["_temporary/d.parquet"]


def test_a_name_with_glob_marks_is_that_file(lake: Path) -> None:
    path = write(lake / "what[1]?.parquet", group("p", 0.9, 0.1))
    assert names(lake, str(path)) == ["what[1]?.parquet"]


def test_links_are_followed(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tree)
    assert len(find_files(str(tmp_path / "link"))) == 3


def test_partitions_are_unquoted_and_null_is_known() -> None:
    path = "s3://b/date=2026-03-14/model=org%2Fbase%3D1/consent=__HIVE_DEFAULT_PARTITION__/x=1/x=2/f=3.parquet"
    assert partitions_of(path) == {"date": "2026-03-14", "model": "org/base=1", "consent": None, "x": "2"}


def test_identity_is_the_content(lake: Path, tmp_path: Path) -> None:
    one = write(lake / "a.parquet", group("p", 0.9, 0.1))
    two = tmp_path / "moved" / "b.parquet"
    two.parent.mkdir()
    shutil.copy(one, two)
    os.utime(two, (0, 0))
    assert find_files(str(one))[0].identity == find_files(str(two))[0].identity
    write(one, group("p", 0.9, 0.2))
    assert find_files(str(one))[0].identity != find_files(str(two))[0].identity


def test_identity_of_a_large_file_sees_its_ends(lake: Path) -> None:
    lake.mkdir()
    path = lake / "large.parquet"
    path.write_bytes(bytes(WHOLE * 2))
    before = find_files(str(path))[0].identity
    for position in (0, WHOLE * 2 - 1):
        with open(path, "r+b") as file:
            file.seek(position)
            file.write(b"x")
        after = find_files(str(path))[0].identity
        assert after != before
        before = after


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("{lake}/nothing", "nothing: not found"),
        ("{lake}/*.nothing", r"\*.nothing: the glob matches nothing; expected Parquet files"),
        ("{lake}/empty", "empty: found nothing; expected Parquet files"),
        ("{lake}/hidden", "hidden: found nothing; expected Parquet files"),
        ("{lake}/other", r"other: found 2 files \(a.csv, …\), none called \*.parquet"),
        ("{lake}/pipe", "pipe: got a other; expected a Parquet file or a folder"),
        ("gs://bucket/x", "got scheme gs://; expected a local path or s3://"),
        ("", "data.path: got ''; expected a file"),
        ([], "data.path: got an empty list"),
        (None, "data.path: got an empty list"),
        ([3], "data.path: got 3; expected a file"),
    ],
    ids=str,
)
def test_refusals(lake: Path, location: object, message: str) -> None:
    for folder in ("empty", "hidden", "other"):
        (lake / folder).mkdir(parents=True)
    (lake / "hidden/_SUCCESS").touch()
    (lake / "other/a.csv").touch()
    (lake / "other/b.csv").touch()
    os.mkfifo(lake / "pipe")
    path = location.format(lake=lake) if isinstance(location, str) else location
    with pytest.raises(DataError, match=message) as refused:
        find_files(path)
    assert "\n" not in str(refused.value)


def test_partitions_fill_the_columns_that_files_lack(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    """4 rows a day and model; day 2 is too late, model b not wanted, consent=false not given: 2 of 10 rows stay."""
    rows, schema = drop_column(group("p", 0.9, 0.1), "timestamp", "model", "user_consent")
    for folder in (
        "date=2026-03-01/model=a%2Fx/consent=true",
        "date=2026-03-01/model=b/consent=true",
        "date=2026-03-01/model=a%2Fx/consent=FALSE",
        "date=2026-03-01/model=a%2Fx/consent=__HIVE_DEFAULT_PARTITION__",
        "date=2026-03-02/model=a%2Fx/consent=true",
    ):
        write(lake / folder / "f.parquet", rows, schema)
    counts = prepared(tokenizer, lake, cache, date_to="2026-03-01", models=["a/x"]).counts
    assert counts.dropped == {"OTHER_DATE": 2, "OTHER_MODEL": 2, "NO_CONSENT": 4}
    assert counts.models == {"a/x": 2}
    assert counts.train_rows == 2


def test_a_partition_that_contradicts_the_column_drops_the_row(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    """The traces' day is 14 March 2026, their model `base`. A null in the column contradicts nothing."""
    good = [*group("p", 0.9, 0.1), row("p", "null", 0.5, timestamp=None, model=None)]
    write(lake / "date=2026-03-14/model=base/a.parquet", [*good, row("p", "x", 0.5, model="gpt")])
    write(lake / "date=2026-03-15/model=base/b.parquet", [row("p", "y", 0.5)])
    counts = prepared(tokenizer, lake, cache).counts
    assert counts.dropped == {"CONTRADICTION": 2}
    assert counts.models == {"base": 3}
    assert counts.train_rows == 3


def test_consent_needs_the_column_and_the_partition(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    rows = [row("p", f"{consent}", 0.5, user_consent=consent) for consent in (True, False, None)]
    write(lake / "consent=true/a.parquet", rows)
    write(lake / "consent=false/a.parquet", [row("p", "other", 0.6)])
    write(lake / "b.parquet", group("p", 0.9, 0.1))
    assert prepared(tokenizer, lake, cache).counts.dropped == {"NO_CONSENT": 3}


def test_files_that_a_partition_rules_out_are_counted_unread(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    """The column's type would be refused if the file were read."""
    write(lake / "date=2026-03-14/a.parquet", group("p", 0.9, 0.1))
    rows = [{key: value for key, value in row("p", "x", 0.5).items() if key != "input"} | {"input": 7}]
    write(lake / "date=2026-03-15/b.parquet", rows, None)
    counts = prepared(tokenizer, lake, cache, date_to="2026-03-14").counts
    assert counts.dropped == {"OTHER_DATE": 1}
    with pytest.raises(DataError, match="column 'input' has type int64"):
        prepared(tokenizer, lake, cache)


def test_sources_name_file_and_row(tokenizer: Tokenizer, lake: Path, cache: Path) -> None:
    write(lake / "a.parquet", [row("p", "bad", 0.1)], row_group_size=1)
    write(lake / "b.parquet", [*group("q", 0.2, 0.8), row("p", "good", 0.9)], row_group_size=2)
    found = {tuple(r["rewards"]): r["source"] for r in contents(prepared(tokenizer, lake, cache), source=True)}
    assert found == {(0.9, 0.1): f"{lake}/b.parquet row 2", (0.8, 0.2): f"{lake}/b.parquet row 1"}
