"""Resumable downloads against a server that drops, stalls, refuses, redirects and changes its files."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from histosynth.core import web
from histosynth.core.errors import DataError, RunError
from histosynth.core.fetch import fetch
from histosynth.core.web import Patience, check_url, fetch_json
from tests.tiles.web_server import Answer, serving

BODY = bytes(range(256)) * 40 + b"the end"
OTHER = b"another file" * 900
QUICK = Patience(timeout=5.0, attempts=4)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving() as running:
        yield running


@pytest.fixture
def waits(monkeypatch):
    """How long the code would have waited, without waiting."""
    times = []
    monkeypatch.setattr(web, "_sleep", times.append)
    return times


def md5(body):
    return hashlib.md5(body).hexdigest()


def get(url, path, body=BODY, size=True, patience=QUICK):
    return fetch(url, path, size=len(body) if size else None, digest=md5(body), patience=patience)


def leftovers(path):
    return sorted(p.name for p in path.parent.iterdir() if p != path)


@pytest.mark.parametrize("rude", [False, True])
@pytest.mark.parametrize("drop", [0, 1, 4000, len(BODY) - 1])
def test_a_dropped_connection_goes_on_where_it_ended(server, waits, tmp_path, drop, rude):
    url = server.add("/file", BODY, Answer(drop=drop, rude=rude), Answer())
    path = get(url, tmp_path / "file.zip")
    assert path.read_bytes() == BODY and leftovers(path) == []
    second = server.requests[1]
    # a reset may take away bytes that were on their way
    assert len(server.requests) == 2 and (second.first <= drop if rude else second.first == drop)
    assert second.if_range == ('"v1"' if second.first else None)
    assert second.agent.startswith("histosynth/"), "some repositories refuse the default name"
    assert len(waits) == 1


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    faults=st.lists(
        st.builds(
            Answer,
            status=st.sampled_from([0, 0, 0, 500, 503, 429, 202]),
            drop=st.integers(0, len(BODY) - 1),
            ranges=st.booleans(),
            etag=st.sampled_from(['"v1"', '"v2"', 'W/"weak"', ""]),
            obey_if_range=st.booleans(),
            chunked=st.booleans(),
            body=st.sampled_from([None, BODY[::-1]]),
        ),
        max_size=5,
    ),
    size=st.booleans(),
)
def test_whatever_went_wrong_before_a_good_answer_gives_the_right_file_or_none(
    server, waits, tmp_path_factory, faults, size
):
    path = tmp_path_factory.mktemp("any") / "file"
    server.requests.clear()
    url = server.add("/any", BODY, *faults, Answer())
    try:
        get(url, path, size=size, patience=Patience(attempts=20))
    except DataError as error:  # bytes of two files were mixed under one ETag, or none: the checksum finds it
        assert any(f.body for f in faults) or not size
        assert "MD5" in str(error) and not path.exists()
        server.plans["/any"] = [Answer()]
        get(url, path, size=size)
    assert path.read_bytes() == BODY


def test_a_killed_download_goes_on_when_repeated(server, waits, tmp_path):
    body = os.urandom(300_000)
    url = server.add("/big", body, Answer(hang=200_000), Answer())
    path = tmp_path / "big.zip"
    code = (
        "import sys; from pathlib import Path; from histosynth.core.fetch import fetch\n"
        "fetch(sys.argv[1], Path(sys.argv[2]), size=300000, digest=sys.argv[3])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, url, str(path), md5(body)])
    part = tmp_path / "big.zip.part"
    end = time.monotonic() + 60
    while (not part.exists() or part.stat().st_size < 200_000) and time.monotonic() < end:
        time.sleep(0.02)
    with pytest.raises(RunError, match="Another process is downloading"):
        get(url, path, body)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert part.stat().st_size == 200_000 and not path.exists()
    assert get(url, path, body).read_bytes() == body
    assert server.requests[-1].first == 200_000 and server.requests[-1].if_range == '"v1"'


def test_a_server_that_ignores_ranges_starts_from_the_front(server, waits, tmp_path):
    url = server.add("/file", BODY, Answer(drop=5000), Answer(ranges=False))
    assert get(url, tmp_path / "file").read_bytes() == BODY
    assert server.requests[1].first == 5000


def test_a_server_that_ignores_ranges_and_always_drops_is_given_up(server, waits, tmp_path):
    url = server.add("/file", BODY, Answer(drop=5000, ranges=False))
    with pytest.raises(RunError, match="attempts in a row brought nothing") as caught:
        get(url, tmp_path / "file")
    assert url in str(caught.value) and "Repeat the command" in caught.value.remedy
    assert len(server.requests) == 1 + QUICK.attempts


@pytest.mark.parametrize("obey", [True, False])
def test_a_file_that_changed_between_attempts_is_taken_anew(server, waits, tmp_path, obey):
    old = Answer(body=BODY[::-1], drop=4000)
    url = server.add("/file", BODY, old, Answer(etag='"v2"', obey_if_range=obey))
    assert get(url, tmp_path / "file").read_bytes() == BODY
    assert server.requests[1].first == 4000


def test_what_lies_beyond_the_end_is_not_kept(server, waits, tmp_path):
    """Bytes of an earlier, longer file: the server answers 416."""
    path = tmp_path / "file"
    url = server.add("/file", OTHER, Answer(drop=len(OTHER) - 10), Answer(status=404))
    with pytest.raises(RunError):
        get(url, path, OTHER, size=False)
    short = OTHER[:1000]
    server.add("/file", short, Answer(obey_if_range=False))
    with pytest.raises(DataError, match="MD5"):  # the file that was wanted is no longer there
        get(url, path, OTHER, size=False)
    assert server.requests[-2].first == len(OTHER) - 10 and server.requests[-1].first == 0
    assert (tmp_path / "file.bad").read_bytes() == short


def test_part_files_of_other_downloads_are_not_built_upon(server, waits, tmp_path):
    path = tmp_path / "file"
    (tmp_path / "file.part").write_bytes(b"x" * 5000)
    url = server.add("/file", BODY)
    assert get(url, path).read_bytes() == BODY and server.requests[0].first == 0
    path.unlink()
    (tmp_path / "file.part").write_bytes(b"x" * 5000)
    (tmp_path / "file.part.json").write_text('{"md5": "of another"}')
    assert get(url, path).read_bytes() == BODY and server.requests[1].first == 0
    path.unlink()
    (tmp_path / "file.part").write_bytes(b"x" * 5000)
    (tmp_path / "file.part.json").write_text("{damaged")
    assert get(url, path).read_bytes() == BODY and server.requests[2].first == 0


def test_a_busy_server_is_waited_for(server, waits, tmp_path):
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=100))
    url = server.add(
        "/file",
        BODY,
        Answer(status=503),
        Answer(status=429, headers={"Retry-After": "7"}),
        Answer(status=503, headers={"Retry-After": soon}),
        Answer(),
    )
    assert get(url, tmp_path / "file").read_bytes() == BODY
    assert waits[:2] == [2.0, 7.0] and 80 < waits[2] <= 100
    server.add("/file2", BODY, Answer(status=503, headers={"Retry-After": "86400"}))
    with pytest.raises(RunError, match="asks to wait 24 h 00 min"):
        get(server.url + "/file2", tmp_path / "file2")
    server.add("/file3", BODY, Answer(status=500, headers={"Retry-After": "nonsense"}))
    with pytest.raises(RunError, match="500"):
        get(server.url + "/file3", tmp_path / "file3")
    assert waits[3:] == [2.0, 4.0, 8.0], "back-off doubles"


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_final(server, waits, tmp_path, status):
    url = server.add("/file", BODY, Answer(status=status))
    with pytest.raises(RunError, match=str(status)) as caught:
        get(url, tmp_path / "file")
    assert url in caught.value.message and "--mirror" in caught.value.remedy and waits == []


def test_a_wrong_length_and_a_web_page_are_refused_at_once(server, waits, tmp_path):
    url = server.add("/file", OTHER)
    with pytest.raises(DataError, match=f"has {len(OTHER):,} bytes where {len(BODY):,} are expected") as caught:
        get(url, tmp_path / "file")
    assert url in caught.value.message and caught.value.remedy
    server.add("/file", b"<html>Please log in", Answer(headers={"Content-Type": "text/html; charset=utf-8"}))
    with pytest.raises(DataError, match="web page") as caught:
        get(url, tmp_path / "file")
    assert "login page" in caught.value.remedy
    server.add("/file", BODY, Answer(headers={"Content-Encoding": "gzip"}))
    with pytest.raises(DataError, match="compressed"):
        get(url, tmp_path / "file")
    assert waits == []


def test_a_wrong_checksum_sets_the_file_aside(server, waits, tmp_path):
    url = server.add("/file", BODY[::-1])
    path = tmp_path / "file.zip"
    with pytest.raises(DataError) as caught:
        get(url, path)
    assert md5(BODY) in caught.value.message and url in caught.value.message
    assert (tmp_path / "file.zip.bad").read_bytes() == BODY[::-1] and not path.exists()
    assert "Repeat the command" in caught.value.remedy
    server.add("/file", BODY)
    assert get(url, path).read_bytes() == BODY


def test_chunks_without_a_length(server, waits, tmp_path):
    url = server.add("/file", BODY, Answer(chunked=True))
    assert get(url, tmp_path / "a").read_bytes() == BODY
    assert get(url, tmp_path / "b", size=False).read_bytes() == BODY
    server.add("/file", BODY, Answer(chunked=True, drop=3000), Answer())
    assert get(url, tmp_path / "c", size=False).read_bytes() == BODY
    assert server.requests[-1].first == 3000
    server.add("/file", BODY + b"more and more", Answer(chunked=True))
    assert get(url, tmp_path / "d").read_bytes() == BODY, "an endless answer is cut at the known size"


def test_a_length_that_is_none_is_passed_over(server, waits, tmp_path):
    for number, length in enumerate(("9" * 5000, "some")):
        url = server.add(f"/{number}", BODY, Answer(headers={"Content-Length": length}))
        assert get(url, tmp_path / str(number)).read_bytes() == BODY


def test_silence_and_trickles_are_cut(server, waits, tmp_path):
    url = server.add("/file", BODY, Answer(hang=3000), Answer())
    impatient = Patience(timeout=0.2, slowest=1000)
    assert get(url, tmp_path / "a", patience=impatient).read_bytes() == BODY
    assert server.requests[1].first == 3000
    server.add("/file", BODY, Answer(trickle=0.01), Answer())
    assert get(url, tmp_path / "b", patience=impatient).read_bytes() == BODY
    assert 0 < server.requests[3].first < 1000
    server.add("/file", BODY, Answer(trickle=0.01))
    with pytest.raises(RunError, match="below 1000 bytes a second"):
        get(url, tmp_path / "c", patience=Patience(timeout=0.1, attempts=2))


def test_redirects_are_followed_but_never_to_another_scheme(server, waits, tmp_path):
    server.add("/real", BODY, Answer(drop=100), Answer())
    url = server.add("/moved", b"", Answer(status=302, headers={"Location": "/real"}))
    assert get(url, tmp_path / "a").read_bytes() == BODY
    assert [(r.path, r.first) for r in server.requests] == [
        ("/moved", 0),
        ("/real", 0),
        ("/moved", 100),
        ("/real", 100),
    ]
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for target in (secret.as_uri(), "ftp://127.0.0.1/x", "http://example.org/x", "//example.org/x", "data:,x"):
        for status in (301, 302, 303, 307, 308):
            server.add("/moved", b"", Answer(status=status, headers={"Location": target}))
            with pytest.raises(DataError, match="not https") as caught:
                get(url, tmp_path / "b")
            assert url in caught.value.message and caught.value.remedy
    server.add("/moved", b"", Answer(status=302, headers={"Location": "/moved"}))
    with pytest.raises(RunError, match="302"):
        get(url, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_redirect_from_https_to_this_machine_is_refused():
    request = urllib.request.Request("https://example.org/file")
    follow = web._Redirects().redirect_request
    with pytest.raises(DataError, match="from https to http://127.0.0.1"):
        follow(request, None, 302, "Found", {}, "http://127.0.0.1/file")
    assert follow(request, None, 302, "Found", {}, "https://example.com/f").full_url == "https://example.com/f"


@pytest.mark.parametrize(
    "url", ["http://example.org/x", "file:///etc/hosts", "ftp://h/x", "example.org/x", "https://", ""]
)
def test_only_https_or_this_machine(url):
    with pytest.raises(DataError, match="not an https address"):
        check_url(url)


def test_nobody_listens(waits, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving() as gone:
        url = gone.url + "/file"
    with pytest.raises(RunError, match="cannot be reached: Connection refused") as caught:
        get(url, tmp_path / "file")
    assert "https_proxy" in caught.value.remedy and waits == [2.0, 4.0, 8.0]


def test_a_full_disk_is_not_a_bad_connection(server, waits, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("histosynth.core.fetch.os.fsync", full)
    with pytest.raises(RunError, match="file.part: No space left") as caught:
        get(server.add("/file", BODY), tmp_path / "file")
    assert "Free some space" in caught.value.remedy and waits == []
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "*")
    assert get(server.url + "/file", tmp_path / "file").read_bytes() == BODY
    assert len(server.requests) == 1, "the bytes that were there are enough"


def test_json_is_retried_and_checked(server, waits):
    url = server.add("/j", b'{"a": 1}', Answer(status=503), Answer(drop=4), Answer())
    assert fetch_json(url) == {"a": 1} and len(waits) == 2
    for bad in (b"<html>", b"\xff\xfe", b"NaN", b""):
        server.add("/j", bad)
        with pytest.raises(DataError, match="does not answer with JSON"):
            fetch_json(url)
    server.add("/j", b'{"a": 1}', Answer(headers={"Content-Length": "eight"}))
    assert fetch_json(url) == {"a": 1}
    server.add("/j", b"", Answer(status=404))
    with pytest.raises(RunError, match="404"):
        fetch_json(url)
