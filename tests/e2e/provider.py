"""A small OIDC provider on loopback: keys, a discovery document, and tokens that are really signed."""

import base64
import hashlib
import hmac
import http.server
import json
import threading
import time

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa


def segment(value):
    return base64.urlsafe_b64encode(value if isinstance(value, bytes) else json.dumps(value).encode()).rstrip(b"=").decode()


class Key:
    MAKERS = {
        "RS256": lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
        "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
        "EdDSA": ed25519.Ed25519PrivateKey.generate,
    }

    def __init__(self, algorithm, kid):
        self.algorithm, self.kid, self.private = algorithm, kid, self.MAKERS[algorithm]()

    def jwk(self):
        public = jwt.get_algorithm_by_name(self.algorithm).to_jwk(self.private.public_key(), as_dict=True)
        return {**public, "kid": self.kid, "use": "sig", "alg": self.algorithm}

    def public_pem(self):
        return self.private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


class Provider:
    """Use as a context manager; `keys` are those that it publishes, `fetches` counts how often."""

    def __init__(self):
        self.keys = {kid: Key(algorithm, kid) for algorithm, kid in [("RS256", "rsa-1"), ("ES256", "ec-1"), ("EdDSA", "ed-1")]}
        self.fetches, self.broken = 0, False

    def __enter__(self):
        provider = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path == "/.well-known/openid-configuration":
                    body = {"issuer": provider.issuer, "jwks_uri": provider.issuer + "/keys"}
                else:
                    provider.fetches += 1
                    body = provider.jwks()
                text = b"out of order" if provider.broken else json.dumps(body).encode()
                self.send_response(500 if provider.broken else 200)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.issuer = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def jwks(self):
        # a symmetric key and a kind that nobody knows stand among the others, and must not matter
        strange = [{"kty": "oct", "kid": "shared", "k": segment(b"secret" * 8)}, {"kty": "LATTICE", "kid": "later"}]
        return {"keys": [*strange, *(key.jwk() for key in self.keys.values())]}

    def claims(self, **more):
        now = int(time.time())
        claims = {"iss": self.issuer, "aud": "bora", "sub": "ada", "tenant": "acme", "iat": now, "exp": now + 600, **more}
        return {name: value for name, value in claims.items() if value is not None}

    def token(self, kid="rsa-1", headers=None, key=None, **claims):
        key = key or self.keys[kid]
        return jwt.encode(self.claims(**claims), key.private, key.algorithm, {"kid": key.kid, **(headers or {})})

    def unsigned(self, **claims):
        return f'{segment({"alg": "none", "typ": "JWT"})}.{segment(self.claims(**claims))}.'

    def confused(self, kid="rsa-1", **claims):
        """HS256 with the public key as its secret."""
        signed = f'{segment({"alg": "HS256", "kid": kid})}.{segment(self.claims(**claims))}'
        return f'{signed}.{segment(hmac.new(self.keys[kid].public_pem(), signed.encode(), hashlib.sha256).digest())}'
