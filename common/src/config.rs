//! The configuration file's vocabulary: what a YAML file may say of cluster, registry, models and logs, and
//! how a file is read so that whatever is wrong in it is named with its line.
//!
//! The whole file is put together in the `bora` command (its `router` and `worker` sections belong to those
//! crates). Every value is checked while it is read: past that, types say what holds.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::{DeserializeOwned, DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A configuration that can't be used; the message is what the operator sees.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("{path}: {error}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// A wrong key or value; the reason says what was expected.
    #[error("{path}:{line}:{column}: {reason}", path = path.display())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// Counted from 1; 0 where the whole file is meant.
        line: usize,
        /// Counted from 1.
        column: usize,
        /// Which key, what is wrong with it, and what was expected.
        reason: String,
    },
    /// Values that are right alone and wrong together.
    #[error("{0}")]
    Conflict(String),
}

/// Reads a YAML file into `T` and applies `check` to it. Every error names the file; an error of `check` that begins with a
/// key of the file ([`ConfigError::Conflict`]) also names the line of that key.
///
/// # Errors
/// The file can't be read, is empty, is no YAML of this form, or `check` refuses it.
pub fn read_file<T: DeserializeOwned>(
    path: &Path,
    check: impl FnOnce(&T) -> Result<(), ConfigError>,
) -> Result<T, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Read { path: path.into(), error })?;
    let value = parse(path, &text)?;
    check(&value).map_err(|error| located(path, &text, error))?;
    Ok(value)
}

fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, ConfigError> {
    let wrong = |line, column, reason| ConfigError::Wrong { path: path.into(), line, column, reason };
    if text.lines().map(str::trim).all(|line| line.is_empty() || line.starts_with('#') || line == "---") {
        return Err(wrong(1, 1, "the file is empty".into()));
    }
    serde_yaml::from_str(text).map_err(|error| {
        let (line, column) = error.location().map_or((0, 0), |at| (at.line(), at.column()));
        wrong(line, column, readable(error.to_string()))
    })
}

/// Serde's words without its position and without names of Rust types.
fn readable(mut reason: String) -> String {
    if let Some(at) = reason.rfind(" at line ") {
        reason.truncate(at);
    }
    const TYPES: [(&str, &str); 13] = [
        ("u8", "a whole number from 0 to 255"),
        ("u16", "a whole number from 0 to 65535"),
        ("u32", "a whole number from 0 to 4294967295"),
        ("u64", "a whole number, 0 or more"),
        ("usize", "a whole number, 0 or more"),
        ("i32", "a whole number"),
        ("i64", "a whole number"),
        ("f32", "a number"),
        ("f64", "a number"),
        ("a boolean", "true or false"),
        ("path string", "a path"),
        ("a borrowed string", "a text"),
        ("a string", "a text"),
    ];
    let Some((before, expected)) = reason.rsplit_once(", expected ") else { return reason };
    let plain = TYPES.iter().find(|(name, _)| *name == expected).map(|(_, words)| *words);
    let plain = plain.or_else(|| expected.starts_with("struct ").then_some("a mapping of keys to values"));
    match plain {
        Some(words) => format!("{before}, expected {words}"),
        None => reason,
    }
}

/// Adds file and line to an error that was found after the file was read, if it begins with the key it is about.
pub fn with_location(path: &Path, error: ConfigError) -> ConfigError {
    match std::fs::read_to_string(path) {
        Ok(text) => located(path, &text, error),
        Err(_) => error,
    }
}

fn located(path: &Path, text: &str, error: ConfigError) -> ConfigError {
    let ConfigError::Conflict(reason) = error else { return error };
    let key = reason.split(|c: char| !(c.is_ascii_alphanumeric() || "._[]-".contains(c))).next().unwrap_or_default();
    let (line, column) = locate(text, key.trim_end_matches('.'));
    ConfigError::Wrong { path: path.into(), line, column, reason }
}

/// Line and column (from 1) of the value at `key`, such as `http.admin` or `models[1].name`; of the innermost part that is
/// there if the whole is not.
fn locate(text: &str, key: &str) -> (usize, usize) {
    let parts: Vec<&str> = key.split(['.', '[']).map(|part| part.trim_end_matches(']')).collect();
    (0..=parts.len())
        .rev()
        .find_map(|depth| {
            let seed = Locate(&parts[..depth]);
            let error = seed.deserialize(serde_yaml::Deserializer::from_str(text)).err()?;
            error.to_string().contains(FOUND).then(|| error.location())?
        })
        .map_or((1, 1), |at| (at.line(), at.column()))
}

/// What [`Locate`] fails with at the value that it looks for: the reader adds the position to an error.
const FOUND: &str = "the value is here";

struct Locate<'a>(&'a [&'a str]);

impl<'de> DeserializeSeed<'de> for Locate<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        // a scalar has no method here: serde refuses it with the words of `expecting`, and so with its position
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Locate<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(FOUND)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Some((first, rest)) = self.0.split_first() else { return Err(A::Error::custom(FOUND)) };
        while let Some(key) = map.next_key::<String>()? {
            if key == *first {
                return map.next_value_seed(Locate(rest));
            }
            map.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let Some((first, rest)) = self.0.split_first() else { return Err(A::Error::custom(FOUND)) };
        let Ok(index) = first.parse::<usize>() else { return Ok(()) };
        for _ in 0..index {
            if list.next_element::<IgnoredAny>()?.is_none() {
                return Ok(());
            }
        }
        list.next_element_seed(Locate(rest)).map(|_| ())
    }
}

/// `host:port`; an IPv6 host stands in brackets.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostPort {
    /// A name or an address, without brackets.
    pub host: String,
    /// 0 = any free port, where one listens.
    pub port: u16,
}

impl HostPort {
    /// Whether it is on this host alone. A name other than `localhost` may be anywhere.
    pub fn is_loopback(&self) -> bool {
        let address = self.host.parse::<IpAddr>();
        self.host == "localhost" || address.is_ok_and(|address| address.to_canonical().is_loopback())
    }
}

impl std::str::FromStr for HostPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let expected = || format!("`{text}` is no address: expected host:port, for example 127.0.0.1:8000");
        let (host, port) = text.rsplit_once(':').ok_or_else(expected)?;
        if host.contains("://") || port.starts_with("//") {
            return Err(format!("`{text}` is a URL: expected host:port without a scheme, for example 127.0.0.1:8000"));
        }
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let allowed =
            |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c) || (bracketed.is_some() && ":%".contains(c));
        let host = bracketed.unwrap_or(host);
        if host.is_empty() || !host.chars().all(allowed) {
            return Err(expected());
        }
        let port = port.parse().map_err(|_| format!("`{text}`: expected a port from 0 to 65535"))?;
        Ok(Self { host: host.into(), port })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl<'de> Deserialize<'de> for HostPort {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

impl Serialize for HostPort {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// An amount of memory: `512MiB`, `40GiB`, `1.5GB` or a number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

impl std::str::FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let expected =
            || format!("`{text}` is no amount of memory: expected for example 512MiB, 40GiB or a number of bytes");
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let number: f64 = text[..digits].parse().map_err(|_| expected())?;
        let unit: u64 = match text[digits..].trim() {
            "" | "B" => 1,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            "TiB" => 1 << 40,
            "KB" | "kB" => 1_000,
            "MB" => 1_000_000,
            "GB" => 1_000_000_000,
            "TB" => 1_000_000_000_000,
            _ => return Err(expected()),
        };
        Ok(Self((number * unit as f64) as u64))
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "an amount of memory such as 512MiB, 40GiB or a number of bytes")]
        enum Form {
            Bytes(u64),
            Text(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Bytes(bytes) => Ok(Self(bytes)),
            Form::Text(text) => text.parse().map_err(D::Error::custom),
        }
    }
}

/// Reads a positive number of seconds (fractions allowed).
pub fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let value = f64::deserialize(deserializer)?;
    Duration::try_from_secs_f64(value)
        .ok()
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| D::Error::custom(format!("`{value}`: expected a number of seconds above 0")))
}

/// The same where it may be absent.
pub fn some_seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    seconds(deserializer).map(Some)
}

/// Where groups are announced and found.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryOptions {
    /// The kind.
    pub kind: RegistryKind,
    /// `etcd`: its members. `static`: `host:port` of each group's leader. `memory`: none.
    pub endpoints: Vec<HostPort>,
    /// `etcd`: how long a group that died may still be listed.
    #[serde(deserialize_with = "seconds")]
    pub lease_seconds: Duration,
    /// `etcd`: user name, where it asks for one.
    pub username: Option<String>,
    /// `etcd`: file that holds the user's password. It is read anew for each connection.
    pub password_file: Option<PathBuf>,
    /// `etcd`: TLS; plain text where it is absent.
    pub tls: Option<RegistryTls>,
}

/// TLS towards etcd. The files are read anew for each connection, so that renewed certificates are taken.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegistryTls {
    /// PEM file of the authorities that etcd's certificate is checked against.
    pub ca_file: PathBuf,
    /// PEM file of the certificate that is shown to etcd, where it asks for one.
    #[serde(default)]
    pub certificate_file: Option<PathBuf>,
    /// PEM file of that certificate's key.
    #[serde(default)]
    pub key_file: Option<PathBuf>,
}

impl Default for RegistryOptions {
    fn default() -> Self {
        Self {
            kind: RegistryKind::Memory,
            endpoints: Vec::new(),
            lease_seconds: Duration::from_secs(10),
            username: None,
            password_file: None,
            tls: None,
        }
    }
}

/// Kinds of registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RegistryKind {
    /// A fixed list of endpoints.
    Static,
    /// etcd v3.
    Etcd,
    /// One process.
    Memory,
}

impl RegistryOptions {
    /// Values that don't go together.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.kind != RegistryKind::Memory && self.endpoints.is_empty() {
            return Err(ConfigError::Conflict(format!(
                "registry.endpoints: a registry of kind {:?} needs at least one host:port",
                self.kind
            )));
        }
        if self.username.is_some() != self.password_file.is_some() {
            return Err(ConfigError::Conflict(
                "registry.username and registry.password_file: set both or neither".into(),
            ));
        }
        let halves = self.tls.as_ref().map(|tls| (tls.certificate_file.is_some(), tls.key_file.is_some()));
        if halves.is_some_and(|(certificate, key)| certificate != key) {
            return Err(ConfigError::Conflict(
                "registry.tls.certificate_file and registry.tls.key_file: set both or neither".into(),
            ));
        }
        Ok(())
    }

    /// The user's password; `None` if no file is configured.
    ///
    /// # Errors
    /// The file can't be read or is empty.
    pub fn read_password(&self) -> Result<Option<String>, ConfigError> {
        let Some(file) = &self.password_file else { return Ok(None) };
        let wrong =
            |reason: String| ConfigError::Conflict(format!("registry.password_file: {}: {reason}", file.display()));
        let password = std::fs::read_to_string(file).map_err(|error| wrong(error.to_string()))?;
        let password = password.trim_end();
        if password.is_empty() {
            return Err(wrong("the file is empty".into()));
        }
        Ok(Some(password.to_owned()))
    }

    /// Opens the registry. Nothing is connected yet.
    /// `grpc` is how groups of a static list are asked.
    pub fn open(
        &self,
        cluster: &str,
        grpc: Option<crate::tls::Connector>,
    ) -> Result<std::sync::Arc<dyn crate::registry::Registry>, ConfigError> {
        use crate::registry::{EtcdCredentials, EtcdOptions, EtcdRegistry, FixedRegistry, MemoryRegistry};
        self.check()?;
        let endpoints = self.endpoints.iter().map(ToString::to_string).collect();
        Ok(match self.kind {
            RegistryKind::Memory => std::sync::Arc::new(MemoryRegistry::new()),
            RegistryKind::Static => std::sync::Arc::new(FixedRegistry::new(endpoints, grpc)),
            RegistryKind::Etcd => {
                // read again for each connection; a file that cannot be used is found now
                self.read_password()?;
                let credentials = self.username.clone().zip(self.password_file.clone());
                let credentials =
                    credentials.map(|(username, password_file)| EtcdCredentials { username, password_file });
                std::sync::Arc::new(EtcdRegistry::new(EtcdOptions {
                    endpoints,
                    cluster: cluster.to_owned(),
                    credentials,
                    tls: self.tls.clone(),
                    lease_ttl: self.lease_seconds,
                }))
            }
        })
    }
}

/// A model that is served: the router reads its tokenizer, a worker its weights as well.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelOptions {
    /// The name that requests use.
    pub name: String,
    /// Other names for it.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// Directory of the checkpoint: `config.json` or `params.json`, `*.safetensors`, and the tokenizer.
    pub path: PathBuf,
    /// Directory or file of the tokenizer (`tekken.json`, `tokenizer.json`) where it is not in `path`.
    #[serde(default)]
    pub tokenizer: Option<PathBuf>,
    /// Serve token IDs only: the checkpoint has no tokenizer.
    #[serde(default)]
    pub skip_tokenizer_init: bool,
    /// Longest prompt plus output that routers let pass, whatever its groups say; what the checkpoint says if absent.
    #[serde(default)]
    pub max_model_len: Option<u32>,
    /// The only weights that routers let serve: the fingerprint that workers log at their start. If absent, those of most
    /// of its groups.
    #[serde(default)]
    pub weight_fingerprint: Option<String>,
}

impl ModelOptions {
    /// Where the tokenizer is; `None` where there is none.
    pub fn tokenizer_path(&self) -> Option<&Path> {
        (!self.skip_tokenizer_init).then(|| self.tokenizer.as_deref().unwrap_or(&self.path))
    }
}

/// Log output (to standard error).
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogOptions {
    /// A filter as in `info` or `bora_router=debug,warn`; `info` where it is absent.
    pub level: Option<String>,
    /// Lines for people or for machines.
    pub format: LogFormat,
}

/// Forms of a log line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct File {
        #[serde(default)]
        registry: RegistryOptions,
        #[serde(default)]
        models: Vec<ModelOptions>,
    }

    fn wrong(text: &str) -> String {
        parse::<File>(Path::new("bora.yaml"), text).unwrap_err().to_string()
    }

    #[test]
    fn errors_after_parsing_name_the_line_of_their_key() {
        let text = "registry: {kind: etcd}\nmodels:\n  - name: a\n    path: x\n  - path: y\n    name: b\n";
        let at = |reason: &str| located(Path::new("f"), text, ConfigError::Conflict(reason.into())).to_string();
        assert_eq!(at("registry.kind: no"), "f:1:18: registry.kind: no");
        assert!(at("models[1].name: twice").starts_with("f:6:"), "{}", at("models[1].name: twice"));
        assert!(at("models[0].tokenizer: gone").starts_with("f:3:"), "the innermost part that is there");
        assert_eq!(at("router.retries: gone"), "f:1:1: router.retries: gone");
        assert!(at("models[0].name.deeper: x").starts_with("f:3:"));
        assert!(at("models[7]: x").starts_with("f:3:"));
    }

    #[test]
    fn rust_types_and_empty_files_are_put_into_words() {
        let lease = wrong("registry:\n  lease_seconds: soon\n");
        assert!(lease.contains("expected a number") && !lease.contains("f64"), "{lease}");
        let registry = wrong("registry: 7\n");
        assert!(registry.contains("a mapping of keys to values") && !registry.contains("struct"), "{registry}");
        for empty in ["", "\n# nothing\n---\n"] {
            assert_eq!(wrong(empty), "bora.yaml:1:1: the file is empty");
        }
    }

    #[test]
    fn a_wrong_key_or_value_is_named_with_its_line_and_what_was_expected() {
        let unknown = wrong("registry:\n  kind: etcd\n  endpoint: [a:1]\n");
        assert!(
            unknown
                .starts_with("bora.yaml:3:3: registry: unknown field `endpoint`, expected one of `kind`, `endpoints`"),
            "{unknown}"
        );
        let kind = wrong("registry:\n  kind: zookeeper\n");
        assert!(
            kind.starts_with("bora.yaml:2:") && kind.contains("expected one of `static`, `etcd`, `memory`"),
            "{kind}"
        );
        let address = wrong("registry:\n  kind: etcd\n  endpoints:\n    - localhost\n");
        assert!(address.starts_with("bora.yaml:4:") && address.contains("expected host:port"), "{address}");
        let lease = wrong("registry:\n  lease_seconds: -1\n");
        assert!(lease.starts_with("bora.yaml:2:") && lease.contains("seconds above 0"), "{lease}");
        let missing = wrong("registry: {}\nmodels:\n  - name: x\n");
        assert!(missing.contains("missing field `path`"), "{missing}");
        assert!(wrong("registry: [").starts_with("bora.yaml:"));
    }

    #[test]
    fn values_have_their_forms() {
        assert_eq!("[::1]:80".parse(), Ok(HostPort { host: "::1".into(), port: 80 }));
        assert_eq!(HostPort { host: "::1".into(), port: 80 }.to_string(), "[::1]:80");
        assert_eq!("1.5GiB".parse(), Ok(ByteSize(3 << 29)));
        for url in ["https://etcd:2379", "http://etcd", "etcd:port", "etcd:70000", "a b:1", "[::1:2"] {
            assert!(url.parse::<HostPort>().is_err(), "{url}");
        }
        assert!("https://etcd:2379".parse::<HostPort>().unwrap_err().contains("without a scheme"));
        assert!("4 bananas".parse::<ByteSize>().is_err());
        let file: File = parse(Path::new("f"), "registry: {kind: static, endpoints: ['h:1']}").unwrap();
        assert!(file.registry.check().is_ok() && file.models.is_empty());
        let empty = RegistryOptions { kind: RegistryKind::Etcd, ..Default::default() };
        assert!(empty.check().is_err());
    }
}
