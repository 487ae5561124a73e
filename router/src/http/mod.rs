//! The HTTP server below the routes: ports ([`listen`]), connections ([`connection`]) and their bytes ([`io`]), request
//! bodies ([`body`]), protection from web pages ([`browser`]), and the shutdown ([`shutdown`]).
//!
//! Every state of a connection has a deadline: TLS handshake, idle, head, body, and a response that the client does not
//! read. Every resource has a bound: connections, open files, memory for bodies. A refused request gets an error in the
//! form of the API.

pub mod body;
pub mod browser;
mod connection;
pub mod forwarded;
mod io;
pub mod listen;
pub mod metrics;
pub mod options;
mod refusal;
pub mod shutdown;

use std::net::SocketAddr;

/// Both ends of a request's connection, stored in the request's extensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionInfo {
    /// The client, or the proxy in front of it.
    pub peer: SocketAddr,
    /// The server.
    pub local: SocketAddr,
}
