"""shmcache.engines.redis: URLs, sockets, passwords, TLS."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from servers import processes

import shmcache
from shmcache import EngineDown


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://a,b/0", "one host wanted, 2 found"),
        ("redis://h/x", "database number wanted, 'x'"),
        ("redis://h/-1", "database number wanted"),
        ("redis+cluster://h/1", "database 0 wanted, '1'"),
        ("redis+cluster://h/?prefix=%7B%7D", "hash tag"),
        ("redis://[/tmp/s]/0", "a host wanted"),
        ("redis+unix://h/0", "a socket wanted"),
        ("redis://h/?tls_ca=/ca.pem", "'tls_ca'.*tls=yes wanted"),
        ("redis://h/?timeout=0", "'timeout'"),
        ("redis://h/?nonsense=1", "known are"),
        ("redis://h/?health=perhaps", "'health'"),
    ],
)
def test_bad_urls(url, message):
    """A URL that names no server, or options that do not go together, are refused before anything is sent."""
    with pytest.raises(ValueError, match=message):
        shmcache.open(url)


def test_unix_socket_and_database(start_redis):
    """A unix socket is reached by either form of URL; databases are apart."""
    server = start_redis(unix=True)
    urls = [
        f"redis+unix:u1://{server.host}",
        f"redis+unix:u2://[{server.host}]/0",
        f"redis+unix:u3://[{server.host}]/3",
    ]
    urls[0] = f"redis+unix:u1:///{server.host.lstrip('/')}"
    one, two, three = (shmcache.open(url, health="no") for url in urls)
    one.set("k", 1)
    assert two.get("k") == 1
    assert three.get("k") is None
    for engine in (one, two, three):
        engine.close()


def test_password(start_redis):
    """The URL's password is sent; a wrong one is EngineDown, is not shown, and takes no server down."""
    server = start_redis(password="geheim,@:")
    health = shmcache.open("memory:redis-password://")
    right = shmcache.open(f"redis:right://:geheim,@:@{server}/0", health=health)
    wrong = shmcache.open(f"redis:wrong://:falsch@{server}/0", health=health)
    with pytest.raises(EngineDown) as caught:
        wrong.get("k")
    assert "falsch" not in str(caught.value) + repr(wrong)
    assert str(server) in str(caught.value)
    assert right.set("k", 1)
    for engine in (right, wrong, health):
        engine.close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_tls(start_redis, tmp_path):
    """rediss:// speaks TLS, checks the certificate, and takes any with tls_verify=no."""
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert,
         "-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    files = ["--tls-cert-file", str(cert), "--tls-key-file", str(key), "--tls-ca-cert-file", str(cert)]
    port = processes.free_port()
    start_redis(args=[*files, "--tls-auth-clients", "no", "--tls-port", str(port)])
    options = {"ca": {"tls_ca": str(cert)}, "any": {"tls_verify": "no"}, "none": {}}
    engines = {
        name: shmcache.open(f"rediss:{name}://127.0.0.1:{port}/", health="no", **o)
        for name, o in options.items()
    }
    assert engines["ca"].set("k", 1)
    assert engines["any"].get("k") == 1
    with pytest.raises(EngineDown, match=str(port)):
        engines["none"].get("k")
    for engine in engines.values():
        engine.close()
