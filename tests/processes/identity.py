"""A provider of single sign-on as OpenID Connect describes it: discovery, code, ID token signed with RS256, user info.

Each browser that comes is signed in at once, with one account.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlencode, urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.processes.fakes import LOOPBACK
from tests.processes.helpers import serving_http

CLIENT, SECRET = "farm", "value-of-CHAT_SIGN_ON"
ACCOUNT = {"sub": "4711", "email": "dora@example.com", "email_verified": True, "name": "Dora"}
KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
KEY_ID = "first"


class Provider(BaseHTTPRequestHandler):
    """Answers of the provider."""

    issuer: ClassVar[str] = ""
    # By code: the request that it was given for.
    codes: ClassVar[dict[str, dict[str, str]]] = {}

    def do_GET(self) -> None:
        path, query = urlsplit(self.path).path, _fields(urlsplit(self.path).query)
        if path == "/.well-known/openid-configuration":
            self._say(_about(self.issuer))
        elif path == "/keys":
            key = jwt.algorithms.RSAAlgorithm.to_jwk(KEY.public_key(), as_dict=True)
            self._say({"keys": [key | {"kid": KEY_ID, "use": "sig", "alg": "RS256"}]})
        elif path == "/user" and self.headers["Authorization"] == "Bearer access":
            self._say(ACCOUNT)
        elif path == "/sign-in" and query["client_id"] == CLIENT and "openid" in query["scope"].split():
            code = f"code-{len(self.codes)}"
            self.codes[code] = query
            self.send_response(302)
            self.send_header(
                "Location", f"{query['redirect_uri']}?{urlencode({'code': code, 'state': query['state']})}"
            )
            self.end_headers()
        else:
            self._say({"error": "invalid_request"}, 400)

    def do_POST(self) -> None:
        told = _fields(self.rfile.read(int(self.headers["Content-Length"])).decode())
        asked = self.codes.pop(told.get("code", ""), None)
        basic = base64.b64encode(f"{CLIENT}:{SECRET}".encode()).decode()
        if asked is None or asked["redirect_uri"] != told["redirect_uri"]:
            self._say({"error": "invalid_grant"}, 400)
        elif self.headers["Authorization"] != f"Basic {basic}":
            self._say({"error": "invalid_client"}, 401)
        else:
            now = int(time.time())
            claims = {
                "iss": self.issuer,
                "aud": CLIENT,
                "iat": now,
                "exp": now + 600,
                "nonce": asked["nonce"],
                **ACCOUNT,
            }
            signed = jwt.encode(claims, KEY, "RS256", {"kid": KEY_ID})
            self._say({"access_token": "access", "token_type": "Bearer", "expires_in": 600, "id_token": signed})

    def _say(self, body: dict[str, Any], status: int = 200) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_args: object) -> None:
        """Keeps silent."""


def _fields(text: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(text).items()}


def _about(issuer: str) -> dict[str, Any]:
    return {
        "issuer": issuer, "authorization_endpoint": f"{issuer}/sign-in", "token_endpoint": f"{issuer}/token",
        "jwks_uri": f"{issuer}/keys", "userinfo_endpoint": f"{issuer}/user", "response_types_supported": ["code"],
        "subject_types_supported": ["public"], "id_token_signing_alg_values_supported": ["RS256"],
        "scopes_supported": ["openid", "email", "profile"],
    }  # fmt: skip


@contextmanager
def providing() -> Iterator[str]:
    """Where the provider describes itself."""
    with serving_http(Provider) as port:
        Provider.issuer = f"http://{LOOPBACK}:{port}"
        yield f"{Provider.issuer}/.well-known/openid-configuration"
