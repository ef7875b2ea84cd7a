"""`tiles download`: licence, space, checksums, records of repositories, and sources that can be read."""

import csv
import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from histosynth import cli
from histosynth.core import web
from histosynth.core.errors import DataError, RunError, SettingError
from histosynth.tiles.download import catalogue, rar
from histosynth.tiles.download import job as download
from histosynth.tiles.download.job import DATASETS, DownloadConfig
from histosynth.tiles.sources.source import list_tiles, open_source
from tests.tiles.fake_repository import (
    EBHI_CLASSES,
    SHIPPED,
    ebhi_files,
    ham_metadata,
    md5,
    nct_archive,
    picture,
    publish,
    rarred,
    zipped,
)
from tests.tiles.web_server import Answer, serving


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(web, "_sleep", lambda seconds: None)
    with serving() as running:
        yield running


def run(name, out, path, *more):
    cli.main(["tiles", "download", name, str(out), "--catalogue", str(path), *more])


def read_table(out):
    with open(out / "tiles.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_catalogue_is_sound():
    assert set(DATASETS) == {"nct-crc-he-100k", "nct-crc-he-100k-nonorm", "crc-val-he-7k", "ebhi-seg", "ham10000"}
    for dataset in DATASETS.values():
        assert dataset.citation and dataset.licence_url.startswith("https://") and dataset.tiles > 1000
        for url in (dataset.page, dataset.record, *(f.url for f in dataset.files)):
            assert web.check_url(url).startswith("https://")
        assert dataset.permissive == ("NC" not in dataset.licence)
    assert sum(f.size for f in DATASETS["ham10000"].files) == DATASETS["ham10000"].size == 2_770_778_873


def test_the_list_shows_size_licence_and_citation(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    cli.main(["tiles", "download"])
    bare = capsys.readouterr().out
    cli.main(["tiles", "download", "--list"])
    assert capsys.readouterr().out == bare
    for text in (*DATASETS, "11.7 GB", "800.3 MB", "CC BY-NC 4.0", "10.3389/fmed.2023.1114673", "10,015"):
        assert text in bare


def test_class_folders_stay_in_their_zip(server, tmp_path, capsys):
    body = nct_archive()
    path = publish(server, tmp_path, "crc-val-he-7k", [body])
    out = tmp_path / "out"
    run("crc-val-he-7k", out, path)
    source = out / "CRC-VAL-HE-7K.zip"
    assert source.read_bytes() == body
    printed = capsys.readouterr().out
    assert f"histosynth tiles import {source} TILES" in printed
    assert sorted(p.name for p in out.iterdir()) == [source.name, "crc-val-he-7k.record.json", "download.json"]
    manifest = json.loads((out / "download.json").read_text())
    assert manifest["source"] == source.name and manifest["licence"] == "CC BY 4.0" and manifest["citation"]
    assert manifest["files"] == [
        {
            "name": source.name,
            "key": source.name,
            "url": f"{server.url}/crc-val-he-7k/{source.name}",
            "size": len(body),
            "md5": md5(body),
            "checked_by": "the catalogue",
        }
    ]
    table = list_tiles(source)
    assert open_source(source).rgb(table.path[0])[0].shape == (24, 24, 3)
    assert sorted(table.label.value_counts().items()) == [("ADI", 3), ("BACK", 3), ("TUM", 3)]
    asked = len(server.requests)
    run("crc-val-he-7k", out, path)
    assert len(server.requests) == asked, "what is complete is not asked for again"
    source.write_bytes(body[:-5])  # somebody damaged it since
    with pytest.raises(DataError, match="remove it"):
        download.download("crc-val-he-7k", out, DownloadConfig(catalogue=path))


def check_ebhi(out):
    rows = read_table(out)
    assert len(rows) == 18 and {r["label"] for r in rows} == set(EBHI_CLASSES.values())
    assert all("/image/" in r["path"] and (out / r["path"]).is_file() for r in rows), "masks are no tiles"
    by_file = {Path(r["path"]).name: r["patient"] for r in rows}
    assert by_file["GT2001837-1-400-000.png"] == "GT2001837"
    assert by_file["GTxc2012017-1-400-001.png"] == by_file["GT2012017-1-400-002.png"] == "GT2012017"
    table = list_tiles(out)
    assert len(table) == 18 and set(table.patient) == {"GT2001837", *(f"GT20120{i}7" for i in range(6))}


def test_biopsies_from_a_zip_or_tar(server, tmp_path):
    """The checksum is in no catalogue: the record of the repository has it, and the result says so."""
    path = publish(server, tmp_path, "ebhi-seg", [zipped(ebhi_files())], pin=False)
    out = tmp_path / "out"
    run("ebhi-seg", out, path)
    check_ebhi(out)
    assert not (out / "EBHI-SEG.rar").exists(), "unpacked archives are removed"
    (file,) = json.loads((out / "download.json").read_text())["files"]
    assert file["checked_by"] == "the record of the repository"
    shutil.rmtree(out / "images")
    run("ebhi-seg", out, path, "--keep-archives")
    assert (out / "EBHI-SEG.rar").exists()
    check_ebhi(out)


@pytest.mark.skipif(not shutil.which("bsdtar"), reason="needs bsdtar")
def test_biopsies_from_a_rar(server, tmp_path):
    path = publish(server, tmp_path, "ebhi-seg", [rarred(ebhi_files())], pin=False)
    run("ebhi-seg", tmp_path / "out", path)
    check_ebhi(tmp_path / "out")


def test_a_rar_without_a_program_is_kept_for_later(server, tmp_path, monkeypatch):
    body = rarred(ebhi_files())
    path = publish(server, tmp_path, "ebhi-seg", [body], pin=False)
    config, out = DownloadConfig(catalogue=path), tmp_path / "out"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="none of bsdtar, unar, 7zz, 7z, unrar") as caught:
        download.download("ebhi-seg", out, config)
    assert "apt install libarchive-tools" in caught.value.remedy
    assert (out / "EBHI-SEG.rar").read_bytes() == body and not (out / "download.json").exists()
    # with a program (here one that knows what is in the archive) the same command goes on
    contents = tmp_path / "contents.zip"
    contents.write_bytes(zipped(ebhi_files()))
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "*")
    program = fake_program(tmp_path, f'{sys.executable} -m zipfile -e {contents} "$5"')
    asked = len(server.requests)
    monkeypatch.setenv("PATH", str(program.parent))
    download.download("ebhi-seg", out, config)
    check_ebhi(out)
    assert [r.path for r in server.requests[asked:]] == ["/ebhi-seg/record"], "the archive is not fetched again"


def fake_program(folder, script):
    program = folder / "bin" / "bsdtar"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def test_a_rar_that_fails_or_holds_links_leaves_nothing(tmp_path, monkeypatch):
    archive = tmp_path / "a.rar"
    archive.write_bytes(rarred({"a": b"a"}))
    folder = tmp_path / "out" / "a"
    link = f'{shutil.which("ln")} -s /etc/hosts "$5/link"'
    for script, message in ((link, "'link' is a link"), ("echo torn >&2; exit 3", "torn")):
        program = fake_program(tmp_path, script)
        monkeypatch.setenv("PATH", str(program.parent))
        with pytest.raises(DataError, match=message) as caught:
            rar.unpack_rar(archive, folder)
        assert str(archive) in caught.value.message and caught.value.remedy
        assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(not shutil.which("bsdtar"), reason="needs bsdtar")
def test_a_rar_that_reaches_out_of_its_folder_writes_nothing_there(tmp_path):
    archive = tmp_path / "a.rar"
    archive.write_bytes(rarred({"../../escaped.txt": b"x", "good.txt": b"y"}))
    with pytest.raises(DataError, match="cannot unpack"):
        rar.unpack_rar(archive, tmp_path / "one" / "two")
    assert not list(tmp_path.rglob("escaped.txt")) and not (tmp_path / "one" / "two").exists()
    listing = subprocess.run(["bsdtar", "-tf", str(archive)], capture_output=True, text=True, check=True)
    assert "good.txt" in listing.stdout, "the archive itself is sound"


@pytest.mark.parametrize("separator", [",", "\t"])
def test_lesions_get_their_table(server, tmp_path, separator):
    parts = [zipped({f"ISIC_{k}.jpg": picture(k, "JPEG") for k in ks}) for ks in ((1, 2), (3, 4))]
    path = publish(server, tmp_path, "ham10000", [*parts, ham_metadata(separator)])
    out = tmp_path / "out"
    run("ham10000", out, path, "--accept-licence")
    rows = {Path(r["path"]).name: (r["label"], r["patient"]) for r in read_table(out)}
    assert rows == {"ISIC_1.jpg": ("nv", "HAM_1"), "ISIC_2.jpg": ("nv", "HAM_1"), "ISIC_3.jpg": ("mel", "HAM_2")}
    table = list_tiles(out)
    assert sorted(table.patient) == ["HAM_1", "HAM_1", "HAM_2"]
    assert open_source(out).rgb(table.path[0])[1] == "JPEG"
    assert sorted(p.name for p in out.glob("*.*")) == [
        "HAM10000_metadata.csv",
        "download.json",
        "ham10000.record.json",
        "tiles.csv",
    ]


def test_a_licence_with_conditions_must_be_accepted(server, tmp_path, capsys):
    path = publish(server, tmp_path, "ham10000", [zipped({}), zipped({}), ham_metadata()])
    with pytest.raises(SystemExit) as caught:
        run("ham10000", tmp_path / "out", path)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "CC BY-NC 4.0" in message and "--accept-licence" in message and "licenses/by-nc/4.0" in message
    assert server.requests == [] and not (tmp_path / "out").exists(), "nothing is asked before"


def test_what_is_said_before_it_starts(server, tmp_path, monkeypatch):
    path = publish(server, tmp_path, "crc-val-he-7k", [nct_archive()])
    said = []
    monkeypatch.setattr(download, "say", lambda text: said.append((len(server.requests), text)))
    download.download("crc-val-he-7k", tmp_path / "out", DownloadConfig(catalogue=path))
    before = "\n".join(text for requests, text in said if requests <= 1)  # the record alone was asked
    for text in ("Licence: CC BY 4.0", "Please cite: Kather", "Size: ", "free in"):
        assert text in before


@pytest.mark.parametrize(("name", "factor"), [("crc-val-he-7k", 1.0), ("ebhi-seg", 2.2)])
def test_too_little_space_is_said_before_the_start(server, tmp_path, monkeypatch, name, factor):
    body = nct_archive() if name == "crc-val-he-7k" else zipped(ebhi_files())
    path = publish(server, tmp_path, name, [body], pin=False)
    config, out = DownloadConfig(catalogue=path), tmp_path / "deep" / "out"
    need = factor * len(body)

    def disk(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(0, 0, round(free)))

    disk(need - 10)
    with pytest.raises(RunError, match="free, but .* needs") as caught:
        download.download(name, out, config)
    assert str(tmp_path) in caught.value.message and "another disk" in caught.value.remedy
    assert [r.path for r in server.requests] == [f"/{name}/record"]
    disk(need + 10)
    download.download(name, out, config)
    assert (out / "download.json").exists()


def test_a_half_finished_download_needs_only_the_rest(server, tmp_path, monkeypatch):
    body = nct_archive()
    path = publish(server, tmp_path, "crc-val-he-7k", [body])
    plan = server.plans["/crc-val-he-7k/CRC-VAL-HE-7K.zip"]
    plan[:] = [Answer(drop=len(body) - 1000), Answer(status=404)]
    config, out = DownloadConfig(catalogue=path), tmp_path / "out"
    with pytest.raises(RunError, match="404"):
        download.download("crc-val-he-7k", out, config)
    plan[:] = [Answer()]
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(0, 0, 1100))
    download.download("crc-val-he-7k", out, config)
    assert server.requests[-1].first == len(body) - 1000


def test_a_repository_that_cannot_be_asked(server, tmp_path):
    """Checksums of the catalogue do without the record; otherwise it is an error."""
    body = nct_archive()
    path = publish(server, tmp_path, "crc-val-he-7k", [body])
    server.plans["/crc-val-he-7k/record"] = [Answer(status=503)]
    out = tmp_path / "out"
    assert download.download("crc-val-he-7k", out, DownloadConfig(catalogue=path)).read_bytes() == body
    assert not (out / "crc-val-he-7k.record.json").exists()
    path = publish(server, tmp_path, "ebhi-seg", [zipped(ebhi_files())], pin=False)
    server.plans["/ebhi-seg/record"] = [Answer(status=503)]
    with pytest.raises(RunError, match="cannot be asked") as caught:
        download.download("ebhi-seg", tmp_path / "out2", DownloadConfig(catalogue=path))
    assert "/ebhi-seg/record" in caught.value.message and "ebhi-seg.record.json" in caught.value.remedy


def test_a_record_that_contradicts_the_catalogue_or_makes_no_sense(server, tmp_path):
    path = publish(server, tmp_path, "crc-val-he-7k", [nct_archive()])
    record = json.loads(server.files["/crc-val-he-7k/record"])
    config = DownloadConfig(catalogue=path)

    def refused(change, match):
        changed = json.loads(json.dumps(record))
        change(changed)
        server.files["/crc-val-he-7k/record"] = json.dumps(changed).encode()
        with pytest.raises(DataError, match=match) as caught:
            download._ask(catalogue.load_catalogue(path)["crc-val-he-7k"], config, web.Patience())
        assert "/record" in caught.value.message and "zenodo.org/records" in caught.value.remedy

    refused(lambda r: r["files"][0].update(checksum="md5:" + "0" * 32), "with the MD5 0000")
    refused(lambda r: r["files"][0].update(size=5), "with the size 5")
    refused(lambda r: r["files"][0].update(size=-5), "size -5")
    refused(lambda r: r["files"][0].update(checksum="sha256:x"), "MD5 sha256:x")
    refused(lambda r: r["files"][0].update(key="other.zip"), "has no file CRC-VAL-HE-7K.zip .it has: other.zip")
    refused(lambda r: r.pop("files"), "unknown form")
    refused(lambda r: r.update(files="x"), "unknown form")


def test_a_mirror_is_a_folder_with_the_files_and_the_record(server, tmp_path):
    body = zipped(ebhi_files())
    path = publish(server, tmp_path, "ebhi-seg", [body], pin=False)
    first = tmp_path / "first"
    run("ebhi-seg", first, path, "--keep-archives")
    for file in ("EBHI-SEG.rar", "ebhi-seg.record.json"):
        server.add(f"/mirror/{file}", (first / file).read_bytes())
    server.requests.clear()
    run("ebhi-seg", tmp_path / "second", path, "--mirror", f"{server.url}/mirror/")
    assert [r.path for r in server.requests] == ["/mirror/ebhi-seg.record.json", "/mirror/EBHI-SEG.rar"]
    check_ebhi(tmp_path / "second")
    (file,) = json.loads((tmp_path / "second" / "download.json").read_text())["files"]
    assert file["url"] == f"{server.url}/mirror/EBHI-SEG.rar" and file["checked_by"] == "the record on the mirror"
    del server.files["/mirror/ebhi-seg.record.json"]
    run("ebhi-seg", tmp_path / "bare", path, "--mirror", f"{server.url}/mirror/")
    (file,) = json.loads((tmp_path / "bare" / "download.json").read_text())["files"]
    assert file["checked_by"] == "the record of the repository", "a bare mirror holds the files alone"
    server.files["/mirror/EBHI-SEG.rar"] = body[:-1] + b"x"
    with pytest.raises(DataError, match="MD5"):
        download.download("ebhi-seg", tmp_path / "third", DownloadConfig(catalogue=path, mirror=f"{server.url}/mirror"))
    for bad in ("http://example.org/x", "example.org"):
        with pytest.raises(DataError, match="not an https address"):
            download.download("ebhi-seg", tmp_path / "third", DownloadConfig(catalogue=path, mirror=bad))


def test_files_brought_by_hand_are_verified_and_used(server, tmp_path):
    body = nct_archive()
    path = publish(server, tmp_path, "crc-val-he-7k", [body])
    out = tmp_path / "out"
    out.mkdir()
    (out / "CRC-VAL-HE-7K.zip").write_bytes(body)
    download.download("crc-val-he-7k", out, DownloadConfig(catalogue=path))
    assert [r.path for r in server.requests] == ["/crc-val-he-7k/record"]


def test_two_data_sets_in_one_folder_are_refused(server, tmp_path):
    out = tmp_path / "out"
    path = publish(server, tmp_path, "crc-val-he-7k", [nct_archive()])
    download.download("crc-val-he-7k", out, DownloadConfig(catalogue=path))
    path = publish(server, tmp_path, "ebhi-seg", [zipped(ebhi_files())])
    with pytest.raises(RunError, match="holds another download .crc-val-he-7k."):
        download.download("ebhi-seg", out, DownloadConfig(catalogue=path))


def test_archives_that_are_not_as_the_catalogue_says(server, tmp_path):
    def refused(name, bodies, match):
        path = publish(server, tmp_path, name, bodies)
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        with pytest.raises(DataError, match=match) as caught:
            download.download(name, out, DownloadConfig(catalogue=path, accept_licence=True))
        assert caught.value.remedy and not (out / "download.json").exists() and not (out / "tiles.csv").exists()

    refused("ebhi-seg", [zipped({"EBHI-SEG/Unheard of/image/GT1.png": picture(0)})], "class folder 'Unheard of'")
    refused("ebhi-seg", [zipped({"EBHI-SEG/Normal/label/GT1.png": picture(0)})], "hold no tile")
    images = [zipped({"ISIC_1.jpg": picture(0)}), zipped({"ISIC_2.jpg": picture(1)})]
    refused("ham10000", [*images, b"image_id,lesion_id\nISIC_1,HAM_1\n"], "no column 'dx'")
    refused("ham10000", [*images, b"image_id,lesion_id,dx\nISIC_7,HAM_1,nv\n"], "hold no tile")
    refused("ham10000", [*images, b"\n"], "cannot be read")
    refused("ham10000", [*images, b"\xff\xfe\x00"], "cannot be read")


def test_settings_and_catalogues_with_mistakes(tmp_path):
    with pytest.raises(SettingError, match="no data set 'crc-val'") as caught:
        download.download("crc-val", tmp_path / "out")
    assert "crc-val-he-7k" in caught.value.remedy
    with pytest.raises(SettingError, match="--timeout is 0"):
        download.download("crc-val-he-7k", tmp_path / "out", DownloadConfig(timeout=0))
    good = SHIPPED["crc-val-he-7k"]
    mistakes = [
        "[",
        "3",
        "x: 3",
        yaml.safe_dump({"x": good | {"colour": 1}}),
        yaml.safe_dump({"x": good | {"repository": "elsewhere"}}),
        yaml.safe_dump({"x": good | {"layout": {"kind": "folders"}}}),
        yaml.safe_dump({"x": good | {"layout": {"kind": "folders", "images": "i", "labels": {}, "patient": "("}}}),
        yaml.safe_dump({"x": good | {"files": [{"name": "../x", "key": "x"}]}}),
        yaml.safe_dump({"x": good | {"files": [{"name": "x", "key": "x", "md5": "no"}]}}),
        yaml.safe_dump({"x": {k: v for k, v in good.items() if k != "licence"}}),
    ]
    path = tmp_path / "c.yaml"
    for text in mistakes:
        path.write_text(text)
        with pytest.raises(DataError, match="c.yaml") as caught:
            catalogue.load_catalogue(path)
        assert "datasets.yaml" in caught.value.remedy
    with pytest.raises(DataError, match="missing.yaml"):
        catalogue.load_catalogue(tmp_path / "missing.yaml")
    path.write_text(yaml.safe_dump({"mine": good}))
    assert set(catalogue.load_catalogue(path)) == {"mine", *DATASETS}
    with pytest.raises(SystemExit):
        cli.main(["tiles", "download", "crc-val-he-7k"])


def test_the_verb_names_a_wrong_data_set_before_a_missing_folder():
    from histosynth.study.verbs.download import download as verb

    with pytest.raises(SettingError, match="no data set 'nct-crc'"):
        verb("nct-crc")
    with pytest.raises(SettingError, match="tiles download crc-val-he-7k FOLDER"):
        verb("crc-val-he-7k")
