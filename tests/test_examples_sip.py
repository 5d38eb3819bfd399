"""The examples' SIP and digest code against the RFCs' own vectors, and their registrar on a clock of ours."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import registrar
import sip
from registrar import DOMAIN, Credential, Ledger, Registrar, Subscribers, Verifier

import shmcache
from shmcache.engines.memory import MemoryEngine

SOURCE = ("192.0.2.7", 5066)
NOW = 1_700_000_000.0
KEY = b"k" * 32

# -- SIP ---------------------------------------------------------------------------------------------------

TORTUOUS = """INVITE sip:vivekg@chair-dnrc.example.com;unknownparam SIP/2.0
TO :
 sip:vivekg@chair-dnrc.example.com ;   tag    = 1918181833n
from   : "J Rosenberg \\\\\\""       <sip:jdrosen@example.com>
  ;
  tag = 98asjd8
MaX-fOrWaRdS: 0068
Call-ID: wsinv.ndaksdj@192.0.2.1
Content-Length   : 4
cseq: 0009
  INVITE
Via  : SIP  /   2.0
 /UDP
    192.0.2.2;branch=390skdjuw
s :
NewFangledHeader:   newfangled value
 continued newfangled value
UnknownHeaderWithUnusualValue: ;;,,;;,;
Content-Type: application/sdp
v:  SIP  / 2.0  / TCP     spindle.example.com   ;
  branch  =   z9hG4bK9ikj8  ,
 SIP  /    2.0   / UDP  192.168.255.111   ; branch=
 z9hG4bK30239
m:"Quoted string \\"\\"" <sip:jdrosen@example.com> ; newparam =
      newvalue ;
  secondparam ; q = 0.33

v=0
""".replace("\n", "\r\n").encode()
"""RFC 4475, 3.1.1.1, with a shorter body."""


def request(method: str = "REGISTER", user: str = "alice", *extra: str, **changed: str) -> bytes:
    """A request; `changed`: header fields by lower-case name with `_` for `-`, "" to leave one out."""
    me = f"<sip:{user}@{DOMAIN}>"
    fields = {
        "via": "SIP/2.0/UDP 192.0.2.7:5066;branch=z9hG4bK776;rport",
        "from": f"{me};tag=456",
        "to": me if method == "REGISTER" else f"<sip:bob@{DOMAIN}>",
        "call-id": "843817637684230@998sdasdh09",
        "cseq": f"1 {method}",
        "contact": f"<sip:{user}@192.0.2.7:5066>",
        "content-length": "0",
    }
    fields |= {name.rstrip("_").replace("_", "-"): value for name, value in changed.items()}
    lines = [f"{name}: {value}" for name, value in fields.items() if value]
    return "\r\n".join([f"{method} sip:{DOMAIN} SIP/2.0", *lines, *extra, "", ""]).encode()


def test_tortuous_invite() -> None:
    """The tortuous INVITE of RFC 4475 parses: folding, compact names, spaces everywhere, several Vias."""
    found = sip.parse(TORTUOUS)
    assert found.fault is None
    assert (found.method, found.body) == ("INVITE", b"v=0\r")
    assert [(via.transport, via.host, via.parameters["branch"]) for via in found.vias()] == [
        ("UDP", "192.0.2.2", "390skdjuw"),
        ("TCP", "spindle.example.com", "z9hG4bK9ikj8"),
        ("UDP", "192.168.255.111", "z9hG4bK30239"),
    ]
    to, sender = (sip.NameAddress.parse(found.get(name) or "") for name in ("to", "from"))
    assert to == sip.NameAddress("sip:vivekg@chair-dnrc.example.com", {"tag": "1918181833n"})
    assert sender == sip.NameAddress("sip:jdrosen@example.com", {"tag": "98asjd8"})
    contact = sip.NameAddress.parse(found.get("contact") or "")
    assert contact.parameters == {"newparam": "newvalue", "secondparam": "", "q": "0.33"}
    assert found.get("newfangledheader") == "newfangled value continued newfangled value"


def test_reply_copies_the_request() -> None:
    """A response has the request's Vias in order, From, To with a tag, Call-ID and CSeq."""
    message = sip.parse(request("REGISTER", "alice", "Via: SIP/2.0/UDP other.example:5070;branch=z9hG4bK1"))
    lines = (message.reply(403, SOURCE, "abc") or b"").decode().split("\r\n")
    assert lines == [
        "SIP/2.0 403 Forbidden",
        "Via: SIP/2.0/UDP 192.0.2.7:5066;branch=z9hG4bK776;rport=5066;received=192.0.2.7",
        "Via: SIP/2.0/UDP other.example:5070;branch=z9hG4bK1",
        f"From: <sip:alice@{DOMAIN}>;tag=456",
        f"To: <sip:alice@{DOMAIN}>;tag=abc",
        "Call-ID: 843817637684230@998sdasdh09",
        "CSeq: 1 REGISTER",
        "Content-Length: 0",
        "",
        "",
    ]
    tagged = sip.parse(request(to=f"<sip:alice@{DOMAIN}>;tag=theirs"))
    assert b"tag=abc" not in (tagged.reply(200, SOURCE, "abc") or b"")


@pytest.mark.parametrize(
    ("via", "copied", "target"),
    [
        ("192.0.2.7:5090", "192.0.2.7:5090", ("192.0.2.7", 5090)),
        ("192.0.2.7", "192.0.2.7", ("192.0.2.7", 5060)),
        ("pc.example:5090;x=1", "pc.example:5090;x=1;received=192.0.2.7", ("192.0.2.7", 5090)),
        ("[2001:db8::1]:5090;rport;x=1", "[2001:db8::1]:5090;rport=5066;x=1;received=192.0.2.7", SOURCE),
    ],
)
def test_received_and_rport(via: str, copied: str, target: sip.Address) -> None:
    """Without rport a response goes to the port in Via, with it to the port the request came from."""
    message = sip.parse(request(via=f"SIP/2.0/UDP {via}"))
    assert f"\r\nVia: SIP/2.0/UDP {copied}\r\n".encode() in (message.reply(200, SOURCE, "t") or b"")
    assert message.target(SOURCE) == target


def test_content_length_cuts_the_body() -> None:
    """Bytes behind Content-Length are not of the message (RFC 3261, 18.3)."""
    assert sip.parse(request(content_length="3") + b"abcdef").body == b"abc"
    assert sip.parse(request(content_length="") + b"abcdef").body == b"abcdef"


@pytest.mark.parametrize(
    "changed",
    [
        {"call_id": ""},
        {"from": ""},
        {"to": "<sip:alice"},
        {"cseq": "1 INVITE"},
        {"cseq": "4294967296 REGISTER"},
        {"cseq": "x REGISTER"},
        {"via": "SIP/2.0/UDP"},
        {"content_length": "9"},
        {"content_length": "-1"},
        {"via": ""},
        {"x": "1\r\nno colon here"},
        {"x": "1\r\nCSeq: 1 REGISTER"},
    ],
)
def test_faults(changed: dict[str, str]) -> None:
    """A request without the fields of RFC 3261 8.1.1, or with damaged ones, is parsed with a fault."""
    assert sip.parse(request(**changed)).fault is not None
    assert sip.parse(request()).fault is None


@pytest.mark.parametrize(
    "data", [b"", b"\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 40, request(x="a\rb"), b"a b"]
)
def test_no_sip(data: bytes) -> None:
    """What is no SIP message is a ValueError."""
    with pytest.raises(ValueError, match="wanted"):
        sip.parse(data)


@pytest.mark.parametrize(
    ("text", "user", "host"),
    [
        ("sip:alice@Example.ORG", "alice", "example.org"),
        ("SIPS:%61lice:pw@example.org:5061;transport=tcp?x=y", "alice", "example.org"),
        ("sip:a%3Ab@example.org", "a:b", "example.org"),
        ("sip:%C3%A9ve@[2001:db8::1]", "éve", "[2001:db8::1]"),
        ("sip:example.org", "", "example.org"),
    ],
)
def test_uri(text: str, user: str, host: str) -> None:
    """User and host of a URI: escapes resolved after the password is cut off, host in lower case."""
    assert sip.Uri.parse(text) == sip.Uri(user, host)


# -- digest ------------------------------------------------------------------------------------------------

RFC7616 = (
    "Mufasa",
    "http-auth@example.org",
    "7ypf/xlj9XXwfDPEoM4URrv/xwf94BcCAzFZH4GiTo0v",
    "Circle of Life",
)
RFC7616_CNONCE = "f2/wE4q74E6zIJEtWaHKaf5wv/H5QzzpXusqGemxURZJ"
RFC2617 = ("Mufasa", "testrealm@host.com", "dcd98b7102dd2f0e8b11d0f600bfb0c093", "Circle Of Life")
RFC2069 = ("Mufasa", "testrealm@host.com", "dcd98b7102dd2f0e8b11d0f600bfb0c093", "CircleOfLife")


@pytest.mark.parametrize(
    ("who", "algorithm", "qop", "cnonce", "response"),
    [
        (RFC2617, "MD5", "auth", "0a4f113b", "6629fae49393a05397450978507c4ef1"),
        (RFC7616, "MD5", "auth", RFC7616_CNONCE, "8ca523f5e9506fed4657c9700eebdbec"),
        (
            RFC7616, "SHA-256", "auth", RFC7616_CNONCE,
            "753927fa0e85d155564e2e272a28d1802ca10daf4496794697cf8db5856cb6c1",
        ),
        (RFC2069, "MD5", "", "", "1949323746fe6a43ef61f9606e7febea"),
    ],
    ids=["2617", "7616-MD5", "7616-SHA-256", "2069-erratum"],
)  # fmt: skip
def test_digest_vectors(who: tuple[str, ...], algorithm: str, qop: str, cnonce: str, response: str) -> None:
    """The examples of RFC 2617, RFC 7616 and RFC 2069 (with its erratum), and back through the header."""
    user, realm, nonce, password = who
    hashed = sip.ha1(algorithm, user, realm, password)
    digest = sip.Digest(
        user, realm, nonce, "/dir/index.html", "", algorithm, qop, "00000001" * bool(qop), cnonce
    )
    signed = digest.signed(hashed, "GET")
    assert signed.response == response
    assert sip.Digest.parse(signed.header()) == signed
    assert signed.matches(hashed, "GET")
    assert not signed.matches(hashed, "PUT")


def test_digest_field_forms() -> None:
    """Names in any case, spaces, quotes with escapes and commas, an unquoted realm."""
    found = sip.Digest.parse(
        'DIGEST  UserName = "a\\"b, c" ,realm=r, nonce="n",uri="sip:x",'
        'response="00", qop="auth",nc=0000000A,cnonce="c=1,"'
    )
    assert (found.username, found.realm, found.nc, found.cnonce) == ('a"b, c', "r", "0000000A", "c=1,")
    assert found.algorithm == "MD5"


@pytest.mark.parametrize(
    "value",
    [
        "Basic Zm9v",
        "Digest",
        'Digest username="a", realm="r", nonce="n", uri="u"',
        'Digest username="a", realm="r", nonce="n", uri="u", response="x", realm="r"',
        'Digest username="a", realm="r", nonce="n", uri="u", response="x", algorithm=SHA-1',
        'Digest username="a", realm="r", nonce="n", uri="u", response="x", qop=auth-int, nc=00000001',
        'Digest username="a", realm="r", nonce="n", uri="u", response="x", qop=auth, nc=1, cnonce="c"',
        'Digest username="a", realm="r", nonce="n", uri="u", response="x", qop=auth, nc=00000001',
        'Digest username="a, realm="r"',
    ],
)
def test_digest_refused(value: str) -> None:
    """Credentials that lack a field, have one twice, or want what is not offered are a ValueError."""
    with pytest.raises(ValueError, match="wanted"):
        sip.Digest.parse(value)


def test_nonces() -> None:
    """Whoever has the key knows a nonce until its lifetime is over; a changed or foreign one is forged."""
    nonces, other = sip.Nonces(KEY, 30), sip.Nonces(b"x" * 32, 30)
    nonce = nonces.make(NOW)
    assert nonce != nonces.make(NOW)
    assert sip.Nonces(KEY, 30).judge(nonce, NOW + 29.99) is sip.NonceState.GOOD
    assert nonces.judge(nonce, NOW + 30) is sip.NonceState.STALE
    assert nonces.judge(nonce, NOW - 1) is sip.NonceState.STALE
    assert other.judge(nonce, NOW) is sip.NonceState.FORGED
    for place in range(0, 64, 7):
        changed = nonce[:place] + ("0" if nonce[place] != "0" else "1") + nonce[place + 1 :]
        assert nonces.judge(changed, NOW) is sip.NonceState.FORGED
    assert nonces.judge("", NOW) is sip.NonceState.FORGED


# -- the registrar -----------------------------------------------------------------------------------------


class Server:
    """A registrar over memory:// with alice's account, on a clock that stands still."""

    def __init__(self, path: Path, cache: MemoryEngine) -> None:
        self.cache, self.subscribers = cache, Subscribers(path)
        self.cache._set_clock(0)
        self.ledger, self.nonces = Ledger(100), sip.Nonces(KEY, 30)
        self.nonce = self.nonces.make(NOW)
        self.nc = 0

    def registrar(self) -> Registrar:
        verifier = Verifier(self.cache, self.subscribers, self.ledger)
        return Registrar(verifier, self.cache, self.nonces, KEY, self.ledger)

    def ask(self, datagram: bytes, now: float = NOW) -> sip.Message:
        answer = self.registrar().answer(datagram, SOURCE, now)
        assert answer is not None
        return sip.parse(answer[0])

    def signed(self, method: str = "REGISTER", password: str = "right", **changed: str) -> bytes:
        """A signed request with a nonce count of its own; `changed`: fields of the digest."""
        self.nc += 1
        user, algorithm = changed.get("username", "alice"), changed.get("algorithm", "SHA-256")
        fields = {"username": user, "realm": DOMAIN, "nonce": self.nonce, "uri": f"sip:{DOMAIN}"}
        fields |= {"algorithm": algorithm} | changed
        digest = sip.Digest(**fields, nc=f"{self.nc:08x}", cnonce="c")
        header = digest.signed(sip.ha1(algorithm, user, DOMAIN, password), method).header()
        name = "Authorization" if method == "REGISTER" else "Proxy-Authorization"
        return request(method, "alice", f"{name}: {header}")

    def status(self, method: str = "REGISTER", password: str = "right", **changed: str) -> int:
        return self.ask(self.signed(method, password, **changed)).status

    @property
    def queries(self) -> int:
        return self.ledger.count("queries")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with MemoryEngine() as cache:
        made = Server(tmp_path / "db.sqlite", cache)
        made.subscribers.create({"alice": Credential.make("alice", "right")})
        yield made
        made.subscribers.close()


@pytest.mark.parametrize(
    ("method", "status", "name"),
    [("REGISTER", 401, "www-authenticate"), ("INVITE", 407, "proxy-authenticate")],
)
def test_challenge(server: Server, method: str, status: int, name: str) -> None:
    """An unsigned request is challenged for both algorithms, SHA-256 first, and costs no query."""
    answer = server.ask(request(method))
    offers = [sip.authentication(value) for value in answer.all(name)]
    assert answer.status == status
    assert [offer["algorithm"] for offer in offers] == ["SHA-256", "MD5"]
    assert {(offer["realm"], offer["qop"]) for offer in offers} == {(DOMAIN, "auth")}
    assert server.nonces.judge(offers[0]["nonce"], NOW) is sip.NonceState.GOOD
    assert server.queries == 0


def test_register_and_invite_share(server: Server) -> None:
    """One query serves REGISTER, INVITE and both algorithms for 1200 s; then the database is asked again."""
    for method in ("REGISTER", "INVITE"):
        for algorithm in ("SHA-256", "MD5"):
            assert server.status(method, algorithm=algorithm) == 200
    assert (server.queries, server.ledger.count("hits")) == (1, 3)
    assert server.cache.ttl("passwd_alice") == registrar.CREDENTIAL_TTL_S == 1200
    server.cache._set_clock(1_199_999)
    assert (server.status(), server.queries) == (200, 1)
    server.cache._set_clock(1_200_000)
    assert (server.status(), server.queries) == (200, 2)


def test_wrong_password(server: Server) -> None:
    """A wrong password costs one query, cached credential or not, and leaves the right one cached."""
    assert (server.status(password="wrong"), server.queries) == (403, 1)
    assert (server.status(password="wrong"), server.queries) == (403, 2)
    assert (server.status(), server.queries) == (200, 2)


def test_password_change(server: Server) -> None:
    """After a change the old password is accepted while cached; the new one at once, which ends that."""
    assert server.status() == 200
    server.subscribers.change("alice", Credential.make("alice", "new"))
    assert (server.status(), server.queries) == (200, 1)
    assert (server.status(password="new"), server.queries) == (200, 2)
    assert (server.status(), server.queries) == (403, 3)
    assert (server.status("INVITE", "new"), server.queries) == (200, 3)


def test_nonces_before_lookups(server: Server) -> None:
    """A stale nonce is answered stale=true, a forged one by a plain challenge; neither costs a query."""
    datagram = server.signed()
    stale = server.ask(datagram, NOW + 30)
    assert stale.status == 401
    assert all(value.endswith("stale=true") for value in stale.all("www-authenticate"))
    forged = server.ask(server.signed(nonce="0" * 64))
    assert forged.status == 401
    assert "stale" not in "".join(forged.all("www-authenticate"))
    assert server.queries == 0


def test_statuses(server: Server) -> None:
    """403 for another's name, 404 for an unknown user or domain, 400, 405, 505 for what cannot be served."""
    assert server.status(username="bob") == 403
    assert server.status(uri="sip:elsewhere") == 400
    assert server.queries == 0
    stranger = server.signed(username="bob").replace(b"alice@", b"bob@")
    assert (server.ask(stranger).status, server.queries) == (404, 1)
    assert server.ask(request(to="<sip:alice@elsewhere.example>")).status == 404
    assert server.ask(request("OPTIONS")).status == 405
    assert server.ask(request(cseq="1 INVITE")).status == 400
    assert server.ask(request(to="<tel:+1>")).status == 400
    assert server.ask(request().replace(b"SIP/2.0\r\n", b"SIP/3.0\r\n", 1)).status == 505
    assert server.ask(request("REGISTER", "alice", f'Authorization: Digest realm="{DOMAIN}"')).status == 400
    for silent in (request("ACK"), b"SIP/2.0 200 OK\r\n\r\n", b"garbage"):
        assert server.registrar().answer(silent, SOURCE, NOW) is None


def test_retransmission(server: Server) -> None:
    """A retransmitted request gets the same response from another worker, and is looked up once."""
    for datagram, status in ((server.signed(), 200), (server.signed(password="wrong"), 403)):
        first = server.registrar().answer(datagram, SOURCE, NOW)
        queries = server.queries
        assert server.registrar().answer(datagram, SOURCE, NOW) == first
        assert server.ask(datagram, NOW + 31).status == status  # its nonce is stale, its answer is not
        assert server.queries == queries
    assert [server.ledger.count(name) for name in ("accepted", "wrong", "absorbed")] == [1, 1, 4]


def test_retransmission_after_death(server: Server) -> None:
    """A request whose worker was killed over it is judged again once its claim is over."""
    datagram, dead = server.signed(), server.registrar()
    dead._verifier.judge = lambda *_: pytest.fail("killed")  # type: ignore[method-assign]
    with pytest.raises(pytest.fail.Exception):
        dead.answer(datagram, SOURCE, NOW)
    assert server.registrar().answer(datagram, SOURCE, NOW) is None
    server.cache._set_clock(int(registrar.CLAIM_TTL_S * 1000))
    assert server.ask(datagram).status == 200


def test_cache_down(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every cache call failing, requests are answered from the database and the errors counted."""

    def down(*arguments: Any, **options: Any) -> Any:
        raise shmcache.EngineDown("cache: an answer wanted, none found")

    for name in ("get", "set", "add", "delete"):
        monkeypatch.setattr(MemoryEngine, name, down)
    assert (server.status(), server.status(password="wrong")) == (200, 403)
    assert server.queries == 2
    assert server.ledger.count("errors") >= 4


def test_damaged_datagrams(server: Server) -> None:
    """A registrar answers damaged datagrams, or is silent; it raises for none of 3,000."""
    rng = random.Random(4)
    seeds = [TORTUOUS, request(), request("INVITE"), server.signed(), server.signed("INVITE")]
    worker = server.registrar()
    for _ in range(3000):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(data))
            data[place : place + rng.randint(0, 9)] = rng.choice(
                [b"", b"\r\n", b'"', b";", rng.randbytes(3), b"\\"]
            )
        worker.answer(bytes(data), SOURCE, NOW)
