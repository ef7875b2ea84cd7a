"""Small copies of the public data sets, served with records as the repositories write them."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from histosynth.tiles.download import catalogue

SHIPPED = yaml.safe_load(Path(catalogue.__file__).with_name("datasets.yaml").read_text())
EBHI_CLASSES = SHIPPED["ebhi-seg"]["layout"]["labels"]


def md5(body):
    return hashlib.md5(body).hexdigest()


def picture(seed, kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def zipped(files):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, body in files.items():
            archive.writestr(name, body)
    return stream.getvalue()


def vint(number):
    """A RAR 5.0 variable-length integer: seven bits a byte, lowest first."""
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def rarred(files):
    """A RAR 5.0 archive with its files stored (block layout of the published format description)."""

    def block(header, data=b""):
        header = vint(len(header)) + header
        return zlib.crc32(header).to_bytes(4, "little") + header + data

    archive = b"Rar!\x1a\x07\x01\x00" + block(vint(1) + vint(0) + vint(0))
    for name, body in files.items():
        fields = vint(4) + vint(len(body)) + vint(0o100644) + zlib.crc32(body).to_bytes(4, "little")
        text = name.encode()
        header = vint(2) + vint(2) + vint(len(body)) + fields + vint(0) + vint(1) + vint(len(text)) + text
        archive += block(header, body)
    return archive + block(vint(5) + vint(0) + vint(0))


def nct_archive():
    classes = ("ADI", "BACK", "TUM")
    return zipped({f"CRC-VAL-HE-7K/{c}/{c}-{k}.tif": picture(k, "TIFF") for c in classes for k in range(3)})


def ebhi_files():
    files = {"EBHI-SEG/Readme.txt": b"read me"}
    for i, label in enumerate(EBHI_CLASSES):
        for k, patient in enumerate(("GT2001837", f"GTxc20120{i}7", f"GT20120{i}7")):
            for folder in ("image", "label"):
                files[f"EBHI-SEG/{label}/{folder}/{patient}-1-400-00{k}.png"] = picture(10 * i + k)
    return files


HAM_ROWS = [("HAM_1", "ISIC_1", "nv"), ("HAM_1", "ISIC_2", "nv"), ("HAM_2", "ISIC_3", "mel"), ("HAM_3", "ISIC_9", "df")]


def ham_metadata(separator=","):
    rows = [("lesion_id", "image_id", "dx", "age"), *((*row, "50") for row in HAM_ROWS)]
    return "".join(separator.join(row) + "\n" for row in rows).encode()


def publish(server, tmp_path, name, bodies, *, pin=True, **changes):
    """Serve fake files and the record of the repository; return the catalogue that points there."""
    entry = json.loads(json.dumps(SHIPPED[name])) | changes
    listed = []
    for file, body in zip(entry["files"], bodies, strict=True):
        url = server.add(f"/{name}/{file['name']}", body)
        file |= {"url": url}
        if pin:
            file |= {"size": len(body), "md5": md5(body)}
        else:
            file.pop("md5", None), file.pop("size", None)
        listed.append((file, body))
    records = {
        "zenodo": {
            "files": [
                {"key": f["key"], "size": len(b), "checksum": f"md5:{md5(b)}", "links": {"self": f["url"]}}
                for f, b in listed
            ]
        },
        "figshare": {
            "files": [
                {"id": f["key"], "name": f["name"], "size": len(b), "computed_md5": md5(b), "download_url": f["url"]}
                for f, b in listed
            ]
        },
        "dataverse": {
            "data": {"latestVersion": {"files": [{"dataFile": _dataverse_file(f, b)} for f, b in listed]}},
        },
    }
    entry["record"] = server.add(f"/{name}/record", json.dumps(records[entry["repository"]]).encode())
    path = tmp_path / "catalogue.yaml"
    path.write_text(yaml.safe_dump({name: entry}))
    return path


def _dataverse_file(file, body):
    one = {"id": int(file["key"]) if file["key"].isdecimal() else 0, "filename": file["name"], "md5": md5(body)}
    if file["name"].endswith(".csv"):  # as the repository does with tables: the size is that of its own copy
        return one | {"tabularData": True, "filesize": 9 * len(body), "originalFileSize": len(body)}
    return one | {"filesize": len(body)}
