"""Which URLs and addresses may be asked. Nothing here is looked up or connected to."""

from __future__ import annotations

import pytest

from ivdr_deploy.errors import ConfigError, UrlError
from ivdr_deploy.video.urls import UrlSettings, check_url, is_public

ANY = UrlSettings(hosts=("*",), schemes=("https", "http"))
SOME = UrlSettings(hosts=("videos.example.com", "*.store.example", "odd.example:8443"))

NOT_URLS = [
    "", "videos.example.com/a.mp4", "//videos.example.com/a.mp4", "https://", "https:///a.mp4",
    "https:videos.example.com", "file:///etc/passwd", "ftp://videos.example.com/a",
    "gopher://videos.example.com:70/_x", "data:video/mp4;base64,AAAA", "dict://127.0.0.1:11211/",
    "ldap://videos.example.com", "jar:https://videos.example.com!/x", "javascript:alert(1)", "concat:a|b",
    "rtsp://videos.example.com/a", "unix:///var/run/docker.sock", "s3://bucket/key", "netdoc:///etc/passwd",
    "https://user:secret@videos.example.com/", "https://videos.example.com@127.0.0.1/",
    "https://a@b@videos.example.com/", "https://videos.example.com\\@127.0.0.1/", "https:\\\\127.0.0.1\\a",
    "https://127.0.0.1\t.example.com/", "https://videos.example.com/a b", "https://videos.example.com/\r\nHost: x",
    "https://videos.example.com/\x00", "https://vidéos.example.com/", "https://①②⑦.⓪.⓪.①/", "https://127。0。0。1/",
    "https://videos.example.com/" + "a" * 5000, "https://videos.example.com:0x50/",
    "https://videos.example.com:99999/", "https://videos.example.com:-1/", "https://[::1", "https://[::1%25eth0]/",
    "https://[videos.example.com]/", "https://[v1.x]/", "https://::1/",
]  # fmt: skip

ODD_HOSTS = [
    "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "017700000001", "127.1", "127.0.1", "0", "0.0.0",
    "1.1.1.1.1", "127.0.0.1.", "127.0.0.01", "127.0.0.256", "%31%32%37.0.0.1", "127.0.0.1%00", "a..b", ".a",
    "-a.example", "a_b.example", "localhost.", "0x", "a" * 64 + ".example",
]  # fmt: skip

PRIVATE = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255",
    "192.168.1.1", "169.254.169.254", "169.254.170.2", "100.64.0.1", "100.100.100.200", "168.63.129.16",
    "192.0.0.192", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "192.88.99.1", "224.0.0.1",
    "239.255.255.255", "240.0.0.1", "255.255.255.255", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1",
    "::ffff:7f00:1", "::ffff:8.8.8.8", "::ffff:0:8.8.8.8", "64:ff9b::7f00:1", "64:ff9b::8.8.8.8", "64:ff9b:1::1",
    "100::1", "2001::1", "2001:0:7f00:1::", "2001:10::1", "2001:20::1", "2001:db8::1", "2002:7f00:1::",
    "2002:808:808::", "3fff::1", "2620:4f:8000::1", "4000::1", "5f00::1", "fc00::1", "fd00:ec2::254",
    "fd20:ce::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "ff0e::1", "", "localhost", "8.8.8.8/32",
    "256.1.1.1",
]  # fmt: skip

PUBLIC = [
    "8.8.8.8", "1.1.1.1", "93.184.216.34", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00:1450::1",
]  # fmt: skip


@pytest.mark.parametrize("url", NOT_URLS)
def test_what_is_no_url_or_has_more_in_it_is_refused(url: str) -> None:
    for settings in (ANY, SOME):
        with pytest.raises(UrlError) as caught:
            check_url(url, settings)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("host", ODD_HOSTS)
def test_a_host_that_some_library_takes_for_an_address_is_refused(host: str) -> None:
    with pytest.raises(UrlError):
        check_url(f"http://{host}/a.mp4", ANY)


@pytest.mark.parametrize("address", PRIVATE)
def test_an_address_that_is_not_public_is_none(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_one(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("https://videos.example.com/a.mp4?token=1#part", True),
        ("https://VIDEOS.Example.COM", True),
        ("https://videos.example.com:443/", True),
        ("https://videos.example.com:8443/", False),
        ("https://odd.example:8443/", True),
        ("https://odd.example/", False),
        ("http://videos.example.com/", False),
        ("https://a.store.example/", True),
        ("https://a.b.store.example/", True),
        ("https://store.example/", False),
        ("https://evilstore.example/", False),
        ("https://videos.example.com.evil.example/", False),
        ("https://example.com/", False),
        ("https://8.8.8.8/", False),
    ],
)
def test_hosts_and_ports_are_those_of_the_list(url: str, allowed: bool) -> None:
    if not allowed:
        with pytest.raises(UrlError):
            check_url(url, SOME)
        return
    target = check_url(url, SOME)
    assert (target.scheme, target.host) == ("https", target.host.lower())
    assert target.shown in ("https://" + target.host, "https://odd.example:8443")


def test_what_is_asked_for_is_the_path_with_the_query_and_without_the_rest() -> None:
    target = check_url("http://[2606:4700::1111]:80/a%20b.mp4?x=1&y=/../2#secret", ANY)
    assert (target.host, target.port, target.path) == ("2606:4700::1111", 80, "/a%20b.mp4?x=1&y=/../2")
    assert (target.authority, target.address) == ("[2606:4700::1111]", "2606:4700::1111")
    assert check_url("https://videos.example.com?x=1", ANY).path == "/?x=1"


def test_no_url_is_taken_unless_hosts_are_named() -> None:
    with pytest.raises(UrlError, match="takes no URLs"):
        check_url("https://videos.example.com/a.mp4", UrlSettings())


@pytest.mark.parametrize(
    "values",
    [
        {"hosts": ("https://videos.example.com",)}, {"hosts": ("*example.com",)}, {"hosts": ("a.*.com",)},
        {"hosts": ("",)}, {"hosts": ("a:0",)}, {"hosts": ("a:70000",)}, {"hosts": ("a/b",)}, {"hosts": ("A.example",)},
        {"schemes": ()}, {"max_redirects": -1}, {"max_redirects": 11}, {"seconds": 0.0}, {"seconds": float("nan")},
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        UrlSettings(**values)  # type: ignore[arg-type]
