//! The HTTP server below the routes: ports ([`listen`]), connections ([`connection`]) and their bytes ([`io`]), request
//! bodies ([`body`]), protection from web pages ([`browser`]), and the end of the server ([`shutdown`]).
//!
//! Every state of a connection has a deadline: the TLS handshake, idle, a head, a body, a response that the client does
//! not take. Every resource has a bound: connections, open files, memory for bodies. What is refused is served in the
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

/// Both ends of the connection that a request came by; in its extensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionInfo {
    /// The client, or the proxy in front of it.
    pub peer: SocketAddr,
    /// The server.
    pub local: SocketAddr,
}
