//! `bora admin`: what an operator does with a running cluster. Groups and open requests are asked of a router's admin
//! port; a drain or a resumption goes to the group's leader, with the operator's certificate if the cluster has TLS.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bora_common::peer::{Expected, Role};
use bora_common::registry::GroupRecord;
use bora_common::tls;
use bora_proto::v1::{DrainRequest, ResumeRequest, admin_client::AdminClient};
use clap::{Args, Subcommand};
use serde_json::Value;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};

use crate::config::Config;
use crate::top::ask::Asker;

mod table;

/// How long a connection to a leader may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// What a call takes longer than the drain that it waits for.
const CALL_MARGIN: Duration = Duration::from_secs(10);
/// Longest drain that a group takes.
const MAX_DRAIN_SECONDS: u64 = 86_400;

/// Whom to ask, and for what.
#[derive(Args, Debug)]
pub(crate) struct AdminArgs {
    /// host:port of a router's admin port (http.admin); https://host:port where it speaks TLS
    #[arg(long, default_value = "127.0.0.1:8000", global = true)]
    router: String,
    /// an API key, where the router asks for one
    #[arg(long, env = "BORA_API_KEY", hide_env_values = true, global = true)]
    api_key: Option<String>,
    /// PEM file of the authorities that the router's certificate is checked against; the system's where absent
    #[arg(long, global = true)]
    ca_file: Option<PathBuf>,
    /// configuration file with grpc.tls, whose certificate bears the role of an operator
    #[arg(long, global = true)]
    config: Option<PathBuf>,
    /// JSON in place of a table
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Lists the groups and what they are busy with
    Groups,
    /// Lists the open requests: tenant, model, group, age, tokens
    Requests,
    /// Stops a group from taking requests, and waits until those that run have ended
    Drain {
        /// name of the group
        group: String,
        /// seconds after which requests that still run move to other groups
        #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=MAX_DRAIN_SECONDS))]
        timeout_seconds: u64,
    },
    /// Lets a drained group take requests again
    Resume {
        /// name of the group
        group: String,
    },
}

/// Asks once, and prints the response.
pub(crate) fn run(args: AdminArgs) -> anyhow::Result<()> {
    let config = match &args.config {
        Some(path) => Config::read(path)?,
        None => Config::default(),
    };
    crate::runtime()?.block_on(async {
        let asker = Asker::new(&args.router, args.api_key.as_deref(), args.ca_file.as_deref(), false)?;
        let text = match &args.what {
            What::Groups => {
                let listing = json(&asker, "/groups").await?;
                if args.json { pretty(&listing["groups"])? } else { table::groups(&listing["groups"]) }
            }
            What::Requests => {
                let listing = json(&asker, "/requests").await?;
                if args.json { pretty(&listing["requests"])? } else { table::requests(&listing["requests"]) }
            }
            What::Drain { group, timeout_seconds } => {
                let timeout = Duration::from_secs(*timeout_seconds);
                let mut leader = leader(&asker, &config, group).await?;
                let mut request = tonic::Request::new(DrainRequest { timeout_seconds: timeout.as_secs_f64() });
                request.set_timeout(timeout + CALL_MARGIN);
                let drained = leader.drain(request).await.with_context(|| format!("draining {group}"))?.into_inner();
                let (finished, unfinished) = (drained.finished, drained.unfinished);
                if args.json {
                    pretty(&serde_json::json!({"group": group, "finished": finished, "unfinished": unfinished}))?
                } else {
                    format!("{group} is drained: {finished} requests finished, {unfinished} moved to other groups")
                }
            }
            What::Resume { group } => {
                let mut request = tonic::Request::new(ResumeRequest {});
                request.set_timeout(CALL_MARGIN);
                let mut leader = leader(&asker, &config, group).await?;
                leader.resume(request).await.with_context(|| format!("resuming {group}"))?;
                if args.json {
                    pretty(&serde_json::json!({"group": group, "resumed": true}))?
                } else {
                    format!("{group} takes requests again")
                }
            }
        };
        // a reader that has gone, such as `head`, is no failure
        let _ = writeln!(std::io::stdout(), "{text}");
        Ok(())
    })
}

async fn json(asker: &Asker, path: &str) -> anyhow::Result<Value> {
    serde_json::from_str(&asker.get(path).await?).with_context(|| path.to_owned())
}

fn pretty(value: &Value) -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(value)?)
}

/// Calls the leader of a group, and no other server.
async fn leader(
    asker: &Asker,
    config: &Config,
    group: &str,
) -> anyhow::Result<AdminClient<InterceptedService<Channel, Expected>>> {
    let listing = json(asker, "/groups").await?;
    let found = listing["groups"].as_array().into_iter().flatten().find(|one| one["group"] == group);
    let Some(found) = found else { bail!("the router knows no group `{group}`") };
    let record: GroupRecord = serde_json::from_value(found.clone()).context("/groups")?;
    let cluster = listing["cluster"].as_str().context("/groups names no cluster: is the router older?")?;
    let connector = config.grpc.connector(cluster, &[Role::Operator]).context("grpc.tls")?;
    let endpoint = Endpoint::from_shared(format!("http://{}", record.endpoint))?.connect_timeout(CONNECT_TIMEOUT);
    let connecting = tokio::time::timeout(CONNECT_TIMEOUT, tls::connect(&endpoint, connector.as_ref()));
    let channel = connecting.await.map_err(anyhow::Error::from).and_then(|channel| Ok(channel?));
    let channel = channel.with_context(|| format!("connecting to the leader of {group} at {}", record.endpoint))?;
    Ok(AdminClient::with_interceptor(channel, Expected::of_record(cluster, &record)))
}
