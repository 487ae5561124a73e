//! Verification of one token (RFC 7515 and 7519, compact form): its parts, its signature, its claims. The signatures
//! use ring, which TLS already depends on; a JWT library would replace only this file.

use std::time::{SystemTime, UNIX_EPOCH};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA384,
    RSA_PKCS1_2048_8192_SHA512, RSA_PSS_2048_8192_SHA256, RSA_PSS_2048_8192_SHA384, RSA_PSS_2048_8192_SHA512,
    RsaParameters, RsaPublicKeyComponents, UnparsedPublicKey, VerificationAlgorithm,
};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{JwtAlgorithm, JwtOptions};

/// Why a token is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// No keys are loaded yet.
    NoKeys,
    /// Its key is unknown.
    UnknownKey,
    /// The reason, which the client may see.
    Bad(&'static str),
}

/// The header of a token.
#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    crit: Option<Value>,
}

/// A token that is parsed and not verified yet.
pub(super) struct Token<'a> {
    /// Its algorithm, one of the allowed ones.
    pub(super) algorithm: JwtAlgorithm,
    /// The ID of its key.
    pub(super) key_id: Option<String>,
    signed: &'a str,
    payload: &'a str,
    signature: Vec<u8>,
}

impl<'a> Token<'a> {
    /// Parses a token, and refuses algorithms that are not in the list (`none` is never in it).
    pub(super) fn read(token: &'a str, allowed: &[JwtAlgorithm]) -> Result<Self, Refusal> {
        let (signed, signature) = token.rsplit_once('.').ok_or(Refusal::Bad("it does not have three parts"))?;
        let (header, payload) = signed.split_once('.').ok_or(Refusal::Bad("it does not have three parts"))?;
        if payload.contains('.') {
            return Err(Refusal::Bad("it does not have three parts"));
        }
        let header: Header = decode(header)
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .ok_or(Refusal::Bad("its header cannot be parsed"))?;
        let algorithm = JwtAlgorithm::of(&header.alg)
            .filter(|algorithm| allowed.contains(algorithm))
            .ok_or(Refusal::Bad("its algorithm is not allowed"))?;
        if header.crit.is_some() {
            return Err(Refusal::Bad("it has critical extensions"));
        }
        let signature = decode(signature).ok_or(Refusal::Bad("its signature cannot be decoded"))?;
        Ok(Self { algorithm, key_id: header.kid, signed, payload, signature })
    }

    /// Returns its claims if this key signed it and the claims are valid now.
    pub(super) fn claims(&self, key: &PublicKey, options: &JwtOptions) -> Result<Map<String, Value>, Refusal> {
        if !key.verify(self.algorithm, self.signed.as_bytes(), &self.signature) {
            return Err(Refusal::Bad("its signature is invalid"));
        }
        let claims: Map<String, Value> = decode(self.payload)
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .ok_or(Refusal::Bad("its claims cannot be parsed"))?;
        judge(&claims, options, now())?;
        Ok(claims)
    }
}

/// Checks the claims at a time.
fn judge(claims: &Map<String, Value>, options: &JwtOptions, now: u64) -> Result<(), Refusal> {
    let bad = |words| Err(Refusal::Bad(words));
    let skew = options.clock_skew_seconds as f64;
    let now = now as f64;
    match claims.get("exp") {
        None => return bad("it lacks `exp`"),
        Some(Value::Number(expires)) if expires.as_f64().is_some_and(|expires| now < expires + skew) => {}
        Some(Value::Number(_)) => return bad("it has expired"),
        Some(_) => return bad("`exp` is not a time"),
    }
    match claims.get("nbf") {
        None => {}
        Some(Value::Number(begins)) if begins.as_f64().is_some_and(|begins| begins <= now + skew) => {}
        Some(Value::Number(_)) => return bad("it is not valid yet"),
        Some(_) => return bad("`nbf` is not a time"),
    }
    match claims.get("iss") {
        None => return bad("it lacks `iss`"),
        Some(Value::String(issuer)) if *issuer == options.issuer => {}
        Some(_) => return bad("its issuer is another one"),
    }
    let ours = |audience: &Value| audience.as_str().is_some_and(|one| options.audience.iter().any(|our| our == one));
    match claims.get("aud") {
        None => bad("it lacks `aud`"),
        Some(Value::Array(audience)) if audience.iter().any(ours) => Ok(()),
        Some(audience) if ours(audience) => Ok(()),
        Some(_) => bad("it is meant for another audience"),
    }
}

/// The current time in seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn decode(part: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(part).ok()
}

/// A key of a JSON Web Key Set (RFC 7517, 7518 and 8037), with the fields that are used here.
#[derive(Deserialize)]
struct Jwk {
    kty: String,
    kid: Option<String>,
    r#use: Option<String>,
    alg: Option<String>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

/// A public key and its permitted algorithms.
pub(super) struct PublicKey {
    pub(super) id: Option<String>,
    /// The single algorithm that its `alg` permits.
    only: Option<JwtAlgorithm>,
    kind: Kind,
}

enum Kind {
    Rsa {
        n: Vec<u8>,
        e: Vec<u8>,
    },
    /// An uncompressed point.
    P256(Vec<u8>),
    P384(Vec<u8>),
    Ed25519(Vec<u8>),
}

impl PublicKey {
    /// Converts a signature key of a supported type; symmetric keys are never supported.
    pub(super) fn of_jwk(jwk: Value) -> Option<Self> {
        let jwk: Jwk = serde_json::from_value(jwk).ok()?;
        if jwk.r#use.as_deref().is_some_and(|purpose| purpose != "sig") {
            return None;
        }
        // a key with an unsupported `alg` is left out
        let only = match &jwk.alg {
            Some(name) => Some(JwtAlgorithm::of(name)?),
            None => None,
        };
        let part = |part: &Option<String>| part.as_deref().and_then(decode);
        let kind = match (jwk.kty.as_str(), jwk.crv.as_deref()) {
            ("RSA", _) => Kind::Rsa { n: part(&jwk.n)?, e: part(&jwk.e)? },
            ("EC", Some("P-256")) => Kind::P256(point(part(&jwk.x)?, part(&jwk.y)?, 32)?),
            ("EC", Some("P-384")) => Kind::P384(point(part(&jwk.x)?, part(&jwk.y)?, 48)?),
            ("OKP", Some("Ed25519")) => Kind::Ed25519(part(&jwk.x)?),
            _ => return None,
        };
        Some(Self { id: jwk.kid, only, kind })
    }

    /// Whether the key can verify signatures of an algorithm.
    pub(super) fn fits(&self, algorithm: JwtAlgorithm) -> bool {
        let kind = match self.kind {
            Kind::Rsa { .. } => rsa(algorithm).is_some(),
            Kind::P256(_) => algorithm == JwtAlgorithm::ES256,
            Kind::P384(_) => algorithm == JwtAlgorithm::ES384,
            Kind::Ed25519(_) => algorithm == JwtAlgorithm::EdDSA,
        };
        kind && self.only.is_none_or(|only| only == algorithm)
    }

    fn verify(&self, algorithm: JwtAlgorithm, message: &[u8], signature: &[u8]) -> bool {
        if !self.fits(algorithm) {
            return false;
        }
        let plain = |algorithm: &'static dyn VerificationAlgorithm, key: &Vec<u8>| {
            UnparsedPublicKey::new(algorithm, key).verify(message, signature).is_ok()
        };
        match &self.kind {
            Kind::Rsa { n, e } => rsa(algorithm).is_some_and(|parameters| {
                RsaPublicKeyComponents { n, e }.verify(parameters, message, signature).is_ok()
            }),
            Kind::P256(point) => plain(&ECDSA_P256_SHA256_FIXED, point),
            Kind::P384(point) => plain(&ECDSA_P384_SHA384_FIXED, point),
            Kind::Ed25519(key) => plain(&ED25519, key),
        }
    }
}

fn point(x: Vec<u8>, y: Vec<u8>, size: usize) -> Option<Vec<u8>> {
    (x.len() == size && y.len() == size).then(|| [vec![4], x, y].concat())
}

fn rsa(algorithm: JwtAlgorithm) -> Option<&'static RsaParameters> {
    Some(match algorithm {
        JwtAlgorithm::RS256 => &RSA_PKCS1_2048_8192_SHA256,
        JwtAlgorithm::RS384 => &RSA_PKCS1_2048_8192_SHA384,
        JwtAlgorithm::RS512 => &RSA_PKCS1_2048_8192_SHA512,
        JwtAlgorithm::PS256 => &RSA_PSS_2048_8192_SHA256,
        JwtAlgorithm::PS384 => &RSA_PSS_2048_8192_SHA384,
        JwtAlgorithm::PS512 => &RSA_PSS_2048_8192_SHA512,
        JwtAlgorithm::ES256 | JwtAlgorithm::ES384 | JwtAlgorithm::EdDSA => return None,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn options() -> JwtOptions {
        serde_json::from_value(json!({"issuer": "i", "audience": ["a", "b"], "clock_skew_seconds": 10})).unwrap()
    }

    #[test]
    fn checks_each_claim() {
        let good = json!({"iss": "i", "aud": "b", "exp": 1000, "nbf": 900.5});
        let changed = |field: &str, value: Value| {
            let mut claims = good.as_object().unwrap().clone();
            match value {
                Value::Null => drop(claims.remove(field)),
                value => drop(claims.insert(field.into(), value)),
            }
            judge(&claims, &options(), 950)
        };
        for (field, value) in [
            ("sub", json!("x")),
            ("nbf", Value::Null),
            ("nbf", json!(960)),
            ("exp", json!(940.5)),
            ("aud", json!(["x", "a"])),
        ] {
            assert_eq!(changed(field, value.clone()), Ok(()), "{field}: {value}");
        }
        for (field, value, word) in [
            ("exp", Value::Null, "lacks `exp`"),
            ("exp", json!(940), "expired"),
            ("exp", json!(-1), "expired"),
            ("exp", json!("2000"), "not a time"),
            ("exp", json!([2000]), "not a time"),
            ("nbf", json!(961), "not valid yet"),
            ("nbf", json!("1"), "not a time"),
            ("iss", Value::Null, "lacks `iss`"),
            ("iss", json!("j"), "issuer"),
            ("iss", json!(["i"]), "issuer"),
            ("aud", Value::Null, "lacks `aud`"),
            ("aud", json!("x"), "audience"),
            ("aud", json!([]), "audience"),
            ("aud", json!({"a": 1}), "audience"),
            ("aud", json!(["x", 1]), "audience"),
        ] {
            let Err(Refusal::Bad(words)) = changed(field, value.clone()) else { panic!("{field}: {value}") };
            assert!(words.contains(word), "{field}: {value}: {words}");
        }
    }

    #[test]
    fn ignores_unsupported_keys() {
        let rsa = json!({"kty": "RSA", "n": "AQAB", "e": "AQAB", "kid": "k"});
        let with = |field: &str, value: Value| {
            let mut jwk = rsa.clone();
            jwk[field] = value;
            PublicKey::of_jwk(jwk)
        };
        assert!(with("use", json!("sig")).is_some_and(|key| key.fits(JwtAlgorithm::PS512)));
        let only = with("alg", json!("RS256")).unwrap();
        assert!(only.fits(JwtAlgorithm::RS256) && !only.fits(JwtAlgorithm::RS512) && !only.fits(JwtAlgorithm::ES256));
        for (field, value) in [
            ("use", json!("enc")),
            ("alg", json!("HS256")),
            ("alg", json!("RSA-OAEP")),
            ("kty", json!("oct")),
            ("n", json!("not base64!")),
            ("e", Value::Null),
            ("kid", json!(7)),
        ] {
            assert!(with(field, value.clone()).is_none(), "{field}: {value}");
        }
        assert!(PublicKey::of_jwk(json!({"kty": "oct", "k": "c2VjcmV0"})).is_none());
        assert!(PublicKey::of_jwk(json!({"kty": "EC", "crv": "P-256", "x": "AQ", "y": "AQ"})).is_none());
    }
}
