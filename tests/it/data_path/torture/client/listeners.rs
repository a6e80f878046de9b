//! Connecting to clearcoat.

use std::net::SocketAddr;

use tokio::net::{TcpSocket, TcpStream};

use crate::data_path::torture::message::{Conversation, Side};
use crate::data_path::torture::pace::narrow;

/// The addresses of clearcoat's listeners.
#[derive(Clone, Copy, Debug)]
pub struct Listeners {
    pub edge: SocketAddr,
    pub origin: SocketAddr,
}

impl Listeners {
    /// A connection for this conversation.
    pub async fn connect(self, conversation: &Conversation) -> std::io::Result<TcpStream> {
        let socket = TcpSocket::new_v4()?;
        if conversation.narrow {
            narrow(&socket)?;
        }
        let listener = match conversation.side {
            Side::Edge => self.edge,
            Side::Origin => self.origin,
        };
        let stream = socket.connect(listener).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}
