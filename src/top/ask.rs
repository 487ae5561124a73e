//! Asks a router what it knows, and the leaders of its groups how far their ranks are.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bora_common::peer::Expected;
use bora_common::registry::{GroupRecord, GroupState};
use bora_common::telemetry::exposition::{self, Family};
use bora_common::tls::HttpsConnector;
use bora_proto::v1::{RankStatus, StatusRequest, admin_client::AdminClient};
use futures::future::join_all;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::StatusCode;
use hyper::body::Bytes;
use hyper::header::{AUTHORIZATION, HOST, HeaderValue};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tonic::transport::Endpoint;

/// How long a router may take.
const ROUTER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a leader may take: it may not be reachable from here at all.
const LEADER_TIMEOUT: Duration = Duration::from_millis(500);
/// Bytes of a response; a fleet of thousands of groups stays far below.
const MAX_ANSWER: usize = 64 << 20;

/// A group as the router lists it.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Group {
    #[serde(flatten)]
    pub(super) record: GroupRecord,
    pub(super) announced: bool,
    pub(super) watched: bool,
    pub(super) load: Load,
}

impl Group {
    /// In a word.
    pub(super) fn state(&self) -> &'static str {
        match (self.record.state, self.watched, self.announced) {
            (GroupState::Ready, true, true) => "ready",
            (GroupState::Ready, true, false) => "unlisted",
            (GroupState::Ready, false, _) => "unwatched",
            (GroupState::Loading, ..) => "loading",
            (GroupState::Draining, ..) => "draining",
        }
    }
}

/// What a group last reported itself.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(super) struct Load {
    pub(super) running: u32,
    pub(super) waiting: u32,
    pub(super) queued_prefill_tokens: u64,
    pub(super) blocks_total: u32,
    pub(super) blocks_used: u32,
    pub(super) blocks_cached: u32,
    pub(super) steps: u64,
}

#[derive(Deserialize)]
struct Listing {
    cluster: String,
    groups: Vec<Group>,
}

#[derive(Deserialize)]
struct Version {
    version: String,
}

/// Everything at one moment.
#[derive(Clone, Debug)]
pub(super) struct Look {
    pub(super) at: Instant,
    pub(super) router: String,
    pub(super) version: String,
    pub(super) groups: Vec<Group>,
    pub(super) metrics: Vec<Family>,
    /// By group; none where its leader was not asked or did not respond.
    pub(super) ranks: BTreeMap<String, Vec<RankStatus>>,
}

/// Whom to ask.
#[derive(Clone)]
pub(crate) struct Asker {
    /// host:port
    router: String,
    tls: Option<HttpsConnector>,
    /// `Bearer KEY`
    authorization: Option<HeaderValue>,
    ask_leaders: bool,
}

impl Asker {
    /// Of a router at `host:port`, `http://host:port` or `https://host:port`.
    pub(crate) fn new(
        router: &str,
        api_key: Option<&str>,
        ca_file: Option<&Path>,
        ask_leaders: bool,
    ) -> anyhow::Result<Self> {
        let (is_https, address) = match router.split_once("://") {
            None => (ca_file.is_some(), router),
            Some(("https", address)) => (true, address),
            Some(("http", _)) if ca_file.is_some() => bail!("{router}: --ca-file is for https"),
            Some(("http", address)) => (false, address),
            Some(_) => bail!("{router}: expected host:port, http://host:port or https://host:port"),
        };
        let address = address.trim_end_matches('/');
        let authorization = api_key.map(|key| -> anyhow::Result<HeaderValue> {
            let mut value =
                HeaderValue::from_str(&format!("Bearer {key}")).context("the API key is no header's value")?;
            value.set_sensitive(true);
            Ok(value)
        });
        Ok(Self {
            router: address.to_owned(),
            tls: is_https.then(|| HttpsConnector::new(ca_file)).transpose()?,
            authorization: authorization.transpose()?,
            ask_leaders,
        })
    }

    /// Without its port and the brackets of an IPv6 address.
    fn host(&self) -> &str {
        let host = self.router.rsplit_once(':').map_or(self.router.as_str(), |(host, _)| host);
        host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
    }

    /// Looks once.
    pub(super) async fn look(&self) -> anyhow::Result<Look> {
        let at = Instant::now();
        let asked = async { tokio::try_join!(self.get("/version"), self.get("/groups"), self.get("/metrics")) };
        let (version, groups, metrics) = asked.await?;
        let version: Version = serde_json::from_str(&version).context("/version")?;
        let listing: Listing = serde_json::from_str(&groups).context("/groups")?;
        let ranks = if self.ask_leaders { ranks(&listing.cluster, &listing.groups).await } else { BTreeMap::new() };
        Ok(Look {
            at,
            router: self.router.clone(),
            version: version.version,
            groups: listing.groups,
            metrics: exposition::parse(&metrics),
            ranks,
        })
    }

    /// One response of the router, within its time.
    pub(crate) async fn get(&self, path: &str) -> anyhow::Result<String> {
        tokio::time::timeout(ROUTER_TIMEOUT, self.connect_and_get(path))
            .await
            .with_context(|| format!("{} did not answer within {} s", self.router, ROUTER_TIMEOUT.as_secs()))?
    }

    async fn connect_and_get(&self, path: &str) -> anyhow::Result<String> {
        let stream =
            TcpStream::connect(&self.router).await.with_context(|| format!("connecting to {}", self.router))?;
        match &self.tls {
            None => self.get_over(stream, path).await,
            Some(tls) => {
                let stream = tls.handshake(self.host(), stream).await;
                self.get_over(stream.with_context(|| format!("tls with {}", self.router))?, path).await
            }
        }
    }

    async fn get_over(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        path: &str,
    ) -> anyhow::Result<String> {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let driving = tokio::spawn(connection);
        let mut request = hyper::Request::get(path).header(HOST, &self.router).body(Empty::<Bytes>::new())?;
        if let Some(authorization) = &self.authorization {
            request.headers_mut().insert(AUTHORIZATION, authorization.clone());
        }
        let response =
            sender.send_request(request).await.with_context(|| format!("asking {} for {path}", self.router))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        driving.abort();
        let body = body.map_err(|error| anyhow::anyhow!("{path}: {error}"))?.to_bytes();
        if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            bail!("{} answered {status} for {path}: --api-key (or BORA_API_KEY), or its admin port", self.router);
        }
        if !status.is_success() {
            bail!("{} answered {status} for {path}: is it a router?", self.router);
        }
        Ok(String::from_utf8_lossy(&body).into_owned())
    }
}

async fn ranks(cluster: &str, groups: &[Group]) -> BTreeMap<String, Vec<RankStatus>> {
    let responses = join_all(groups.iter().map(|group| async move {
        let asked = tokio::time::timeout(LEADER_TIMEOUT, status(cluster, &group.record)).await;
        (group.record.group.clone(), asked)
    }));
    let known = responses.await.into_iter().filter_map(|(group, response)| Some((group, response.ok()?.ok()?)));
    known.collect()
}

async fn status(cluster: &str, record: &GroupRecord) -> anyhow::Result<Vec<RankStatus>> {
    let channel = Endpoint::from_shared(format!("http://{}", record.endpoint))?.connect().await?;
    let mut leader = AdminClient::with_interceptor(channel, Expected::of_record(cluster, record));
    Ok(leader.status(StatusRequest {}).await?.into_inner().ranks)
}
