"""`mint verify` and `mint gc` on a real server: damage is named, and nothing goes that somebody needs."""

from collections.abc import Callable

import pytest
import typer
from typer.testing import CliRunner

from mint_lib.errors import IntegrityError, InvalidInput
from mint_lib.records import Kind, Reference, StageRecord
from mint_lib.storage.client import StoredObject
from mint_lib.storage.retention import list_old_versions, remove_old_version
from mint_lib.storage.verification import verify_version
from mint_lib.store import Store
from pipelines import store_commands


@pytest.fixture
def mint(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """The two commands in this process: exit code and what they print."""
    monkeypatch.setenv("COLUMNS", "500")
    app = typer.Typer()
    app.command()(store_commands.verify)
    app.command()(store_commands.gc)

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, list(arguments))
        if isinstance(result.exception, InvalidInput | IntegrityError):
            raise result.exception
        return result.exit_code, result.output

    return run


def write_version(
    store: Store, kind: Kind = "cases", *, inputs: tuple[Reference, ...] = (), base: Reference | None = None
) -> Reference:
    sources = {f"input{number}": str(source) for number, source in enumerate(inputs)}
    with store.write(kind, "demo", base=base) as writer:
        if base is not None:
            writer.carry("data.bin")
        else:
            writer.add_bytes("data.bin", writer.version.encode() * 1000)
        return writer.commit(StageRecord(stage="data", config={}, inputs=sources, code_version="test"))


def grow_version(store: Store, *, base: Reference | None = None) -> Reference:
    """A version with one shard more than its base, and files of its own, as `mint data add` writes them."""
    inputs = {"base": str(base)} if base else {}
    with store.write("cases", "demo", base=base) as writer:
        if base is not None:
            writer.carry_table("train")
        number = len([path for path in writer.files if path.startswith("train/")])
        writer.add_bytes(f"train/{number:06d}.parquet", writer.version.encode() * 1000)
        writer.add_bytes("README.md", writer.version.encode())
        return writer.commit(StageRecord(stage="data", config={}, inputs=inputs, code_version="test"))


def list_objects(store: Store, version: str) -> list[StoredObject]:
    return list(store._s3.list_objects(store._layout.folder("cases", "demo", version)))


def damage(store: Store, reference: Reference, path: str, data: bytes) -> None:
    store._s3.put(f"{store.settings.prefix}/{reference.kind}/demo/{reference.version}/{path}", data)


def old_versions(store: Store, *, keep_last: int) -> dict[str, str]:
    """Version to who needs it."""
    found = list_old_versions(store._s3, store._layout, "cases", "demo", keep_last=keep_last)
    return {item.reference.version: item.needed_by for item in found}


def test_verify_of_a_whole_version_says_so(store: Store, mint: Callable[..., tuple[int, str]]):
    cases = write_version(store)
    preferences = write_version(store, "preferences", inputs=(cases,))
    assert mint("verify", "preferences/demo")[0] == 0
    code, text = mint("verify", str(preferences), "--lineage")
    assert code == 0
    assert text.startswith("2 versions, 4 files")


def test_verify_names_every_damage_and_goes_on_after_it(store: Store, mint: Callable[..., tuple[int, str]]):
    with store.write("cases", "demo") as writer:
        for number in range(4):
            writer.add_bytes(f"{number}.bin", b"%d" % number * 100)
        reference = writer.commit(StageRecord(stage="data", config={}, inputs={}, code_version="test"))
    damage(store, reference, "1.bin", b"1" * 99 + b"2")
    damage(store, reference, "3.bin", b"3" * 50)
    store._s3.delete(f"{store.settings.prefix}/cases/demo/v000001/2.bin")
    code, text = mint("verify", "cases/demo")
    assert code == 1
    found = verify_version(store._s3, store._layout, reference)
    assert [item.path for item in found.damages] == ["1.bin", "2.bin", "3.bin"]
    assert found.num_files == 5
    for path, problem in (("1.bin", "its sha256"), ("2.bin", "is missing"), ("3.bin", "has 50 bytes")):
        assert any(f"v000001/{path} is damaged" in line and problem in line for line in text.splitlines())


def test_verify_of_carried_bytes_names_the_version_in_which_they_lie(
    store: Store, mint: Callable[..., tuple[int, str]]
):
    first = write_version(store)
    second = write_version(store, base=first)
    damage(store, first, "data.bin", b"x")
    code, text = mint("verify", str(second))
    assert code == 1
    assert "v000001/data.bin is damaged" in text


def test_verify_of_a_damaged_record_or_a_missing_input_says_so(store: Store):
    cases = write_version(store)
    preferences = write_version(store, "preferences", inputs=(cases,))
    student = write_version(store, "student", inputs=(preferences,))
    store.remove(cases)
    found = verify_version(store._s3, store._layout, preferences)
    assert [item.path for item in found.damages] == ["record.json"]
    assert str(cases) in found.damages[0].problem
    assert verify_version(store._s3, store._layout, student).is_whole
    deep = verify_version(store._s3, store._layout, student, with_lineage=True)
    assert [(item.reference, item.path) for item in deep.damages] == [(str(cases), "manifest.json")]
    damage(store, preferences, "record.json", b"{}")
    deep = verify_version(store._s3, store._layout, student, with_lineage=True)
    assert [(item.reference, item.path) for item in deep.damages] == [(str(preferences), "record.json")]


def test_gc_lists_orphans_and_deletes_them_only_when_told(store: Store, mint: Callable[..., tuple[int, str]]):
    write_version(store)
    with store.write("cases", "demo") as writer:
        writer.add_bytes("half.bin", b"half")
    for arguments in (("gc",), ("gc", "--dry-run"), ("gc", "--older-than-hours", "0")):
        code, text = mint(*arguments)
        assert code == 0
        assert "cases/demo@v000002  2 objects" in text
    assert len(store.list_orphans()) == 1
    assert "deleted" in mint("gc", "--delete", "--older-than-hours", "0")[1]
    assert store.list_orphans() == []
    assert store.list_versions("cases", "demo") == ["v000001"]


def test_gc_keeps_what_an_alias_a_rollback_or_a_kept_version_needs(store: Store, mint: Callable[..., tuple[int, str]]):
    cases = [write_version(store) for _ in range(6)]
    store.move_alias("champion", cases[0], who="w", why="y", expected=None)
    store.move_alias("champion", cases[1], who="w", why="y", expected=cases[0])
    preferences = write_version(store, "preferences", inputs=(cases[2],))
    write_version(store, "student", inputs=(preferences,))
    needed = old_versions(store, keep_last=1)
    assert {version: bool(reason) for version, reason in needed.items()} == {
        "v000001": True,
        "v000002": True,
        "v000003": True,
        "v000004": False,
        "v000005": False,
    }
    assert needed["v000001"] == needed["v000002"] == "alias champion"
    assert needed["v000003"] == str(preferences)
    code, text = mint("gc", "--keep-last", "1", "cases/demo")
    assert code == 0
    assert "2 old versions may go" in text
    assert len(store.list_versions("cases", "demo")) == 6
    assert "2 old versions removed" in mint("gc", "--keep-last", "1", "cases/demo", "--delete")[1]
    assert store.list_versions("cases", "demo") == ["v000001", "v000002", "v000003", "v000006"]
    assert all(verify_version(store._s3, store._layout, cases[index]).is_whole for index in (0, 1, 2, 5))


def test_gc_of_old_versions_follows_the_lineage_to_its_end(store: Store):
    cases = write_version(store)
    rankings = write_version(store, "rankings", inputs=(cases,))
    preferences = write_version(store, "preferences", inputs=(rankings,))
    write_version(store)
    assert old_versions(store, keep_last=1) == {"v000001": str(rankings)}
    store.remove(preferences)
    store.remove(rankings)
    assert old_versions(store, keep_last=1) == {"v000001": ""}


def test_gc_of_versions_that_grew_from_each_other_leaves_the_bytes_in_use(
    store: Store, mint: Callable[..., tuple[int, str]]
):
    newest = grow_version(store)
    for _ in range(6):
        newest = grow_version(store, base=newest)
    rankings = write_version(store, "rankings", inputs=(newest,))
    assert "5 old versions removed" in mint("gc", "--keep-last", "2", "cases/demo", "--delete")[1]
    assert store.list_versions("cases", "demo") == ["v000006", "v000007"]
    assert store.read_bytes(newest, "train/000000.parquet") == b"v000001" * 1000
    for reference in (newest, rankings):
        for with_lineage in (False, True):
            assert verify_version(store._s3, store._layout, reference, with_lineage=with_lineage).damages == ()
    left = [item.key.rpartition("v000001/")[2] for item in list_objects(store, "v000001")]
    assert left == ["claim.json", "holds/v000002.json", "manifest.json", "train/000000.parquet"]
    assert store.list_orphans() == []


def test_gc_removes_bytes_that_the_last_version_has_given_up(store: Store):
    first = grow_version(store)
    second = grow_version(store, base=first)
    third = grow_version(store, base=second)
    with store.write("cases", "demo", base=third) as writer:
        writer.carry("train/000001.parquet")
        last = writer.commit(StageRecord(stage="data", config={}, inputs={}, code_version="test"))
    removed = [store.remove(reference) for reference in (third, second, first)]
    assert [item.num_kept for item in removed] == [0, 1, 0]
    assert verify_version(store._s3, store._layout, last).is_whole
    assert all("parquet" not in item.key for number in (1, 3) for item in list_objects(store, f"v{number:06d}"))


def test_verify_of_a_version_whose_ancestor_was_lost_and_not_removed_says_so(store: Store):
    first = grow_version(store)
    second = grow_version(store, base=first)
    store._s3.delete(store._layout.manifest("cases", "demo", first.version))
    for with_lineage in (False, True):
        found = verify_version(store._s3, store._layout, second, with_lineage=with_lineage)
        assert [str(first) in item.problem or item.reference == str(first) for item in found.damages] == [True]


def test_gc_of_old_versions_keeps_carried_bytes(store: Store, mint: Callable[..., tuple[int, str]]):
    newest = write_version(store)
    for _ in range(3):
        newest = write_version(store, base=newest)
    assert "3 old versions removed" in mint("gc", "--keep-last", "1", "cases/demo", "--delete")[1]
    assert store.read_bytes(newest, "data.bin") == b"v000001" * 1000


def test_gc_with_a_record_that_cannot_be_read_removes_nothing(store: Store, mint: Callable[..., tuple[int, str]]):
    cases = [write_version(store) for _ in range(3)]
    student = write_version(store, "student", inputs=(cases[0],))
    damage(store, student, "record.json", b"{}")
    with pytest.raises(IntegrityError, match=r"student/demo/v000001/record\.json"):
        mint("gc", "--keep-last", "1", "cases/demo", "--delete")
    assert len(store.list_versions("cases", "demo")) == 3


def test_gc_looks_at_the_aliases_once_more_before_it_removes(store: Store):
    cases = [write_version(store) for _ in range(2)]
    (old,) = list_old_versions(store._s3, store._layout, "cases", "demo", keep_last=1)
    store.move_alias("champion", cases[0], who="w", why="y", expected=None)
    with pytest.raises(InvalidInput, match="needed by alias champion"):
        remove_old_version(store._s3, store._layout, old)
    assert store.resolve("cases/demo@champion") == cases[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--keep-last", "2"),
        ("cases/demo",),
        ("--keep-last", "0", "cases/demo"),
        ("--keep-last", "1", "weights/demo"),
        ("--keep-last", "1", "cases/demo@v000001"),
        ("--delete", "--dry-run"),
    ],
)
def test_gc_with_options_that_do_not_fit_says_what_does(
    store: Store, mint: Callable[..., tuple[int, str]], arguments: tuple[str, ...]
):
    with pytest.raises(InvalidInput, match=r"--keep-last|KIND/NAME|--dry-run"):
        mint("gc", *arguments)
