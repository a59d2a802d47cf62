"""Tables hold records of one commit, unless it is said otherwise."""

import json

import pytest

from experiments.collect import main, write_table
from experiments.records import read_records, write_record
from rap_env.errors import InvalidConfig, RecordUnreadable


def record(seed: int, commit: str = "a", dirty: bool = False) -> dict:
    git = {"commit": commit, "dirty": dirty}
    return {"config": {"seed": seed}, "provenance": {"git": git}, "results": {"score": 0.1 + seed, "name": "é"}}


@pytest.fixture
def sweep(tmp_path):
    """Writes a sweep's records, and says where."""

    def write(*records: dict):
        for number, each in enumerate(records):
            write_record(tmp_path / "sweep" / f"agent-{number}" / "record.json", each)
        return tmp_path / "sweep"

    return write


def test_table_reads_back_as_the_records_of_the_sweep(sweep, tmp_path, capsys):
    folder, table = sweep(record(0), record(1)), tmp_path / "results" / "toys.jsonl"
    main([str(folder), str(table)])
    assert read_records(table) == [record(0), record(1)] == read_records(folder)
    assert len(table.read_text().splitlines()) == 2
    assert capsys.readouterr().out == f"2 records: {table}\n"


def test_a_table_may_be_compressed_and_is_the_same_bytes_each_time(tmp_path):
    many = [record(seed) | {"config": {"seed": seed, "names": [f"layer{n}" for n in range(200)]}} for seed in range(20)]
    plain, packed, again = (write_table(tmp_path / name, many) for name in ("a.jsonl", "a.jsonl.gz", "b.jsonl.gz"))
    assert read_records(packed) == read_records(plain) == many
    assert packed.read_bytes() == again.read_bytes()
    assert packed.stat().st_size < 0.1 * plain.stat().st_size
    packed.write_bytes(plain.read_bytes())
    with pytest.raises(RecordUnreadable, match="gzip"):
        read_records(packed)


def test_a_later_table_takes_the_place_of_an_older_one(tmp_path):
    for seed in (0, 1):
        write_table(tmp_path / "a.jsonl", [record(seed)])
    assert read_records(tmp_path / "a.jsonl") == [record(1)]
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    "records",
    [
        [record(0), record(1, commit="b")],
        [record(0, dirty=True)],
        [{**record(0), "provenance": {"git": None}}],
    ],
    ids=["two commits", "changed files", "no checkout"],
)
def test_mixed_records_are_refused_unless_told(records, tmp_path):
    with pytest.raises(InvalidConfig, match=r"expected records of one commit without changes; got .* say --mixed"):
        write_table(tmp_path / "a.jsonl", records)
    assert not list(tmp_path.iterdir())
    assert read_records(write_table(tmp_path / "a.jsonl", records, mixed=True)) == records


def test_refusals_are_one_line(sweep, tmp_path):
    folder = sweep(record(0), record(1, commit="b"))
    with pytest.raises(SystemExit, match=r"^error: .*say --mixed$"):
        main([str(folder), str(tmp_path / "a.jsonl")])
    main(["--mixed", str(folder), str(tmp_path / "a.jsonl")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="there are none"):
        main([str(tmp_path / "empty"), str(tmp_path / "a.jsonl")])
    with pytest.raises(InvalidConfig, match="at least one record; got none"):
        write_table(tmp_path / "b.jsonl", [])
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0]) == record(0)
