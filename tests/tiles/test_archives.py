"""Archives: what is refused and why, nothing outside the folder, and hundreds of mutations."""

import bz2
import gzip
import io
import lzma
import os
import pickle
import shutil
import stat
import struct
import tarfile
import zipfile

import numpy as np
import pytest

from histosynth.core.errors import DataError, HistosynthError, RunError
from histosynth.tiles.sources.archives import Limits, is_archive, open_archive, unpack
from tests.tiles.conftest import mutated

FILES = {
    "top/A/1.png": b"first",
    "top/A/2.png": bytes(1500),
    "top/B c/ü.png": b"third" * 300,
    f"top/{'long' * 30}/{'name' * 40}.png": b"fourth",
    "top/empty.csv": b"",
}


def zipped(files, method=zipfile.ZIP_DEFLATED, change=None):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0))
            info.compress_type = method
            if change:
                change(info)
            archive.writestr(info, data)
    return stream.getvalue()


def tarred(files, kind=tarfile.PAX_FORMAT, extra=()):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in extra:
            archive.addfile(info)
    return stream.getvalue()


KINDS = {
    "deflated.zip": lambda f: zipped(f),
    "stored.zip": lambda f: zipped(f, zipfile.ZIP_STORED),
    "pax.tar": lambda f: tarred(f),
    "gnu.tar": lambda f: tarred(f, tarfile.GNU_FORMAT),
    "x.tar.gz": lambda f: gzip.compress(tarred(f), 6, mtime=0),
    "x.tar.bz2": lambda f: bz2.compress(tarred(f)),
    "x.tar.xz": lambda f: lzma.compress(tarred(f)),
}


def write(folder, name, data):
    path = folder / name
    path.write_bytes(data)
    return path


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_members_are_read_in_place_and_unpacked(tmp_path, kind):
    junk = {"__MACOSX/top/._1.png": b"x", "top/.DS_Store": b"x", "top/A/._1.png": b"x", "Thumbs.db": b"x"}
    path = write(tmp_path, kind, KINDS[kind](FILES | junk))
    assert is_archive(path)
    archive = open_archive(path)
    assert {n: archive.read(n) for n in reversed(archive.members)} == FILES
    again = pickle.loads(pickle.dumps(archive))
    assert again.read("top/A/1.png") == b"first"
    with pytest.raises(DataError, match="holds no file 'top/A/9.png'"):
        archive.read("top/A/9.png")
    assert contents(unpack(path, tmp_path / "out")) == FILES
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([kind, "out"])


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_index_of_a_tar_agrees_with_tarfile(tmp_path, kind):
    rng = np.random.default_rng(kind)
    files = {}
    for k in range(60):
        parts = ["d" * int(rng.integers(1, 60)) for _ in range(rng.integers(1, 4))]
        files["/".join([*parts, f"{k}.png"])] = rng.bytes(int(rng.integers(0, 2000)))
    if kind != tarfile.USTAR_FORMAT:
        files["x" * 200 + "/" + "y" * 200 + ".png"] = b"long"
    path = write(tmp_path, "x.tar", tarred(files, kind))
    with tarfile.open(path) as oracle:
        expected = {m.name: (m.size, m.offset_data) for m in oracle.getmembers()}
    found = open_archive(path).members
    assert {n: (m.size, m.offset) for n, m in found.items()} == expected


def test_folders_are_listed_and_dots_and_backslashes_are_understood(tmp_path):
    directory = tarfile.TarInfo("./B")
    directory.type = tarfile.DIRTYPE
    archive = open_archive(write(tmp_path, "x.tar", tarred({"./A/./1.png": b"1"}, extra=[directory])))
    assert set(archive.members) == {"A/1.png"} and archive.folders == {"B"}
    data = zipped({"A/1.png": b"1"}).replace(b"A/1.png", b"A\\1.png")  # as some writers on Windows do
    assert set(open_archive(write(tmp_path, "x.zip", data)).members) == {"A/1.png"}
    assert sorted(p.name for p in unpack(tmp_path / "x.tar", tmp_path / "out").iterdir()) == ["A", "B"]


def test_a_compressed_tar_is_decompressed_once_and_the_temporary_file_goes_away(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path = write(tmp_path, "x.tgz", KINDS["x.tar.gz"](FILES))
    archive = open_archive(path)
    assert archive.stored.is_file() and list((tmp_path / "temporary").iterdir())
    child = os.fork() if hasattr(os, "fork") else None
    if child == 0:
        del archive  # a worker that ends must leave the file to its parent
        os._exit(0)
    if child:
        os.waitpid(child, 0)
    assert archive.read("top/A/1.png") == b"first"
    del archive
    assert not list((tmp_path / "temporary").iterdir())
    cache = tmp_path / "cache"
    first = open_archive(path, cache=cache).stored
    changed = first.stat().st_mtime_ns
    assert open_archive(path, cache=cache).stored.stat().st_mtime_ns == changed and len(list(cache.iterdir())) == 1
    write(tmp_path, "bad.tgz", gzip.compress(b"no tar at all" * 100))
    with pytest.raises(DataError, match="no zip or tar"):
        open_archive(tmp_path / "bad.tgz")
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/x.png", "absolute"), ("../x.png", "leaves the folder"), ("A/../../x.png", "leaves the folder"),
        ("C:/x.png", "absolute"), ("C:x.png", "absolute"), ("..\\x.png", "leaves the folder"),
        ("\\\\host\\x.png", "absolute"), ("A/x\n.png", "cannot be shown"), ("A/\u202egnp.png", "cannot be shown"),
        ("A/" + "x" * 300, "too long"), ("A/" * 600 + "x.png", "too long"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["deflated.zip", "pax.tar", "x.tar.gz"])
def test_unsafe_names_are_refused(tmp_path, name, reason, kind):
    path = write(tmp_path, kind, KINDS[kind]({"A/1.png": b"1", name: b"evil"}))
    before = sorted(tmp_path.rglob("*"))
    for call in (lambda: open_archive(path), lambda: unpack(path, tmp_path / "out")):
        with pytest.raises(DataError, match=f"refused.*{reason}"):
            call()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_that_is_no_text_is_refused(tmp_path):
    data = tarred({"A/nnnn.png": b"1"}, tarfile.USTAR_FORMAT)
    header = bytearray(data[:512])
    header[2:6] = b"\xe9\xff\xe9\xff"
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 256)
    with pytest.raises(DataError, match="cannot be shown"):
        open_archive(write(tmp_path, "x.tar", bytes(header) + data[512:]))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    link = tarfile.TarInfo("A/link.png")
    link.type, link.linkname = kind, "/etc/passwd"
    path = write(tmp_path, "x.tar", tarred({"A/1.png": b"1"}, extra=[link]))
    with pytest.raises(DataError, match="'A/link.png' is a link, a device"):
        unpack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_encrypted_files_and_odd_methods_in_a_zip_are_refused(tmp_path):
    def link(info):
        info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16

    with pytest.raises(DataError, match="is a link or a device"):
        open_archive(write(tmp_path, "a.zip", zipped({"A/1.png": b"/etc/passwd"}, change=link)))
    data = bytearray(zipped({"A/1.png": b"secret"}))
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + place] |= 1
    with pytest.raises(DataError, match="is encrypted.*password"):
        open_archive(write(tmp_path, "b.zip", bytes(data)))
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):  # Python unpacks these without a limit
        with pytest.raises(DataError, match="packed with method"):
            open_archive(write(tmp_path, "c.zip", zipped({"A/1.png": b"1" * 99}, method)))


def test_names_that_are_one_file_somewhere_are_not_unpacked(tmp_path):
    cases = [
        {"A/x.png": b"1", "A/X.png": b"2"},
        {"A/x.png": b"1", "a/y.png": b"2"},
        {"A/\u00e9.png": b"1", "A/e\u0301.png": b"2"},
        {"A": b"1", "A/y.png": b"2"},
    ]
    for k, files in enumerate(cases):
        path = write(tmp_path, f"{k}.tar", tarred(files))
        with pytest.raises(DataError, match="on some systems|both a file and a folder"):
            unpack(path, tmp_path / "out")
        assert len(open_archive(path).members) == 2, "reading in place needs no files"
    with pytest.warns(UserWarning, match="Duplicate"):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("A/x.png", b"1")
            archive.writestr("A/x.png", b"2")
    with pytest.raises(DataError, match="two files are called 'A/x.png'"):
        open_archive(write(tmp_path, "twice.zip", stream.getvalue()))
    one = tarred({"A/x.png": b"1"})
    with pytest.raises(DataError, match="two files are called"):
        open_archive(write(tmp_path, "twice.tar", one[:1024] + one))
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == []


def test_bombs_are_refused_by_what_they_declare_and_by_what_they_hold(tmp_path):
    limits = Limits(members=3, member_bytes=100_000, total_bytes=150_000, ratio=20, ratio_from=50_000)
    noise = np.random.default_rng(0).bytes
    cases = {
        "limit is 100000 a file": {"a": bytes(100_001)},
        "more than 150000 bytes": {"a": noise(80_000), "b": noise(80_000)},
        "more than 20 times": {"a": bytes(60_000)},
        "limit of 3": {str(k): b"x" for k in range(4)},
    }
    for message, files in cases.items():
        for name, make in (("x.zip", zipped), ("x.tar.gz", KINDS["x.tar.gz"]), ("x.tar.xz", KINDS["x.tar.xz"])):
            path = write(tmp_path, name, make(files))
            compressed_tar_first = "|more than 20 times|more than 150000" if "tar" in name else ""
            with pytest.raises(DataError, match=message + compressed_tar_first):
                unpack(path, tmp_path / "out", limits=limits)
    liar = bytearray(zipped({"a": bytes(90_000)}))
    for mark, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = liar.index(mark) + place
        liar[start : start + 4] = struct.pack("<I", 10)
    with pytest.raises(DataError, match="more than the 10 bytes that it declares"):
        unpack(write(tmp_path, "liar.zip", bytes(liar)), tmp_path / "out", limits=limits)
    with pytest.raises(DataError, match="10 bytes"):
        open_archive(tmp_path / "liar.zip").read("a")
    assert not (tmp_path / "out").exists()


def test_overlapping_members_are_refused(tmp_path):
    """Fifield 2019: one kernel of compressed data, listed by many entries of the directory."""
    data = zipped({"a": bytes(10**6)})
    start = data.index(b"PK\x01\x02")
    entry = data[start : data.index(b"PK\x05\x06")]
    entries = b"".join(entry[:46] + name + entry[47:] for name in (b"a", b"b", b"c", b"d"))
    tail = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 4, 4, len(entries), start, 0)
    with pytest.raises(DataError, match="overlap"):
        open_archive(write(tmp_path, "x.zip", data[:start] + entries + tail))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_or_altered_archive_is_never_a_shorter_one(tmp_path, kind):
    files = {f"A/{k}.png": np.random.default_rng(k).bytes(700) for k in range(5)}
    whole = KINDS[kind](files)
    # the blocks of zeros after the last file of a plain tar say no more than that it ends
    end = -(-len(whole.rstrip(b"\0")) // 512) * 512 if kind.endswith(".tar") else len(whole) - 1
    for cut in sorted({*np.linspace(0, end, 40).astype(int), *range(0, end, 512)}):
        with pytest.raises(DataError):
            archive = open_archive(write(tmp_path, kind, whole[:cut]))
            assert {n: archive.read(n) for n in archive.members} == files
    if not kind.endswith(".tar"):  # a plain tar has no checksum of its data
        for k in range(0, len(whole), 97):
            path = write(tmp_path, kind, whole[:k] + bytes([whole[k] ^ 0x55]) + whole[k + 1 :])
            try:
                archive = open_archive(path)
                found = {n: archive.read(n) for n in archive.members}
            except DataError:
                continue
            assert set(found.values()) <= set(files.values()), "only names and dates have no checksum in a zip"


def test_other_archives_sparse_tars_and_nonsense_are_named(tmp_path):
    for head, kind in ((b"Rar!\x1a\x07", "RAR"), (b"7z\xbc\xaf\x27\x1c", "7-Zip")):
        path = write(tmp_path, "x.bin", head + bytes(600))
        assert is_archive(path)
        with pytest.raises(DataError, match=f"{kind}.*Unpack it"):
            open_archive(path)
    for name in ("x.zip", "x.tar"):
        with pytest.raises(DataError, match="no zip or tar"):
            open_archive(write(tmp_path, name, b"text" * 300))
    with pytest.raises(DataError, match="does not exist"):
        open_archive(tmp_path / "none.zip")
    sparse = tarfile.TarInfo("A/1.png")
    sparse.pax_headers = {"GNU.sparse.major": "1"}
    with pytest.raises(DataError, match="sparse"):
        open_archive(write(tmp_path, "s.tar", tarred({}, extra=[sparse])))
    negative = bytearray(tarred({"A/1.png": b"1"}, tarfile.GNU_FORMAT))
    negative[124:136] = b"\xff" * 10 + b"\xfe\x00"  # a size of -512 would make a reader go round for ever
    negative[148:156] = b"%06o\0 " % (sum(negative[:148]) + sum(negative[156:512]) + 256)
    with pytest.raises(DataError, match="damaged"):
        open_archive(write(tmp_path, "n.tar", bytes(negative)))


def test_a_used_folder_is_not_unpacked_into(tmp_path):
    path = write(tmp_path, "x.zip", zipped(FILES))
    (tmp_path / "out").mkdir()
    unpack(path, tmp_path / "out")
    with pytest.raises(RunError, match="not empty"):
        unpack(path, tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError):
        unpack(path, tmp_path / "file" / "out")


def damage_survived(tmp_path, count, first=0):
    """Index, read and unpack mutated archives: done or refused, and the folder beside them stays as it was."""
    seeds = [(name, make(FILES | {"top/A/.hidden": b"x"})) for name, make in KINDS.items()]
    place = tmp_path / "place"
    refused = 0
    for k in range(first, first + count):
        name, data = seeds[k % len(seeds)]
        place.mkdir()
        path = write(place, name, mutated(data, k))
        try:
            archive = open_archive(path)
            for member in archive.members:
                archive.read(member)
            unpack(path, place / "out")
            assert all(p.resolve().is_relative_to(place / "out") for p in (place / "out").rglob("*"))
        except HistosynthError as error:
            assert error.remedy
            refused += 1
            assert not (place / "out").exists()
        assert {p.name for p in place.iterdir()} <= {name, "out"}
        assert {p.name for p in tmp_path.iterdir()} == {"place"}
        shutil.rmtree(place)
    return refused


def test_mutated_archives_are_read_or_refused(tmp_path):
    assert 200 < damage_survived(tmp_path, 420) < 420


@pytest.mark.slow
def test_many_mutated_archives_are_read_or_refused(tmp_path):
    assert damage_survived(tmp_path, 15_000, first=5000) > 5000


def test_a_large_extended_header_is_read_and_damage_in_it_is_found(tmp_path):
    def with_header(records):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for name, data, kind in (("x", records, b"x"), ("A/1.png", b"1", b"0")):
                member = tarfile.TarInfo(name)
                member.size, member.type = len(data), kind
                archive.addfile(member, io.BytesIO(data))
        return write(tmp_path, "x.tar", stream.getvalue())

    many = b"5 a=\n" * 200_000 + b"17 path=A/ab.png\n"
    assert list(open_archive(with_header(many)).members) == ["A/ab.png"]
    for bad in (b"0 a=\n", b"-5 a=\n", b"99 a=\n", b"5 a\n\n", b"4 a=\n", b" 5 a=\n", b"a=\n", b"5 a=\n5 b", b"7 a=\n"):
        with pytest.raises(DataError, match="is damaged"):
            open_archive(with_header(bad))


def test_crafted_tar_headers_never_hang(tmp_path):
    """Headers with a right checksum and random fields."""
    rng = np.random.default_rng(0)
    base = tarred({"A/1.png": b"1" * 600, "A/2.png": b"2"}, tarfile.GNU_FORMAT)
    for _ in range(400):
        data = bytearray(base)
        start = int(rng.choice([0, 512 * 3]))
        field = int(rng.choice([0, 100, 124, 156, 157, 257, 345]))
        size = int(rng.integers(1, 13))
        data[start + field : start + field + size] = rng.bytes(size)
        header = data[start : start + 512]
        total = sum(header[:148]) + sum(header[156:]) + 256
        data[start + 148 : start + 156] = b"%06o\0 " % total
        path = write(tmp_path, "x.tar", bytes(data))
        try:
            archive = open_archive(path)
            assert sum(len(archive.read(n)) for n in archive.members) <= len(data)
        except DataError as error:
            assert error.remedy
