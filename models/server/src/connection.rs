//! A client's connection, of which the server and the answers to its requests know.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

/// How often a client that has sent more than its request is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// The connection, for the server. It is closed when the last of its owners is gone.
#[derive(Debug)]
pub(crate) struct Connection(Arc<TcpStream>);

/// The connection, for what answers its requests.
#[derive(Clone, Debug)]
pub(crate) struct Client(Arc<TcpStream>);

impl Client {
    /// A connection, twice.
    pub(crate) fn of(stream: TcpStream) -> (Self, Connection) {
        let stream = Arc::new(stream);
        (Self(stream.clone()), Connection(stream))
    }

    /// Waits until the client has closed its side. hyper sees that itself, unless bytes of a next request wait in front.
    pub(crate) async fn left(&self) {
        loop {
            // An error is the end of the connection, too.
            if !self.0.ready(Interest::READABLE).await.is_ok_and(|ready| !ready.is_read_closed()) {
                return;
            }
            // What waits is readable all the time.
            tokio::time::sleep(LOOK).await;
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(cx))?;
            match self.0.try_read(buf.initialize_unfilled()) {
                Ok(count) => {
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl Connection {
    /// Writes as soon as that is possible.
    fn poll_with(
        &self,
        cx: &mut Context<'_>,
        write: impl Fn(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(cx))?;
            match write(&self.0) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_with(cx, |stream| stream.try_write(bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_with(cx, |stream| stream.try_write_vectored(bytes))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// The server drops the connection right behind this, which closes it.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
