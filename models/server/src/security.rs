//! Who may ask: the key, the names of this machine, and other origins.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use sha2::{Digest as _, Sha256};
use tower_http::cors::{AllowHeaders, AllowOrigin, Any, CorsLayer};

use crate::ApiError;
use crate::fields::too_large;
use crate::serve::App;

/// The digest of the server's key. Digests are compared, so that the time of a comparison says nothing about the key.
pub(crate) struct Key([u8; 32]);

impl Key {
    pub(crate) fn new(key: &str) -> Self {
        Self(Sha256::digest(key).into())
    }

    fn is(&self, key: &[u8]) -> bool {
        let other: [u8; 32] = Sha256::digest(key).into();
        self.0.iter().zip(other).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
    }
}

/// Answers 401 without the key, where there is one.
pub(crate) async fn require_key(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    if let Some(key) = &app.key {
        let sent = request.headers().get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
        // The scheme's case does not matter (RFC 9110).
        let sent = sent.and_then(|sent| sent.split_at_checked(7));
        let sent = sent.filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer "));
        if !sent.is_some_and(|(_, sent)| key.is(sent)) {
            return ApiError::key().into_response();
        }
    }
    next.run(request).await
}

/// Refuses requests whose `Host` is not a name of this machine, where only those are served. A web page can make its
/// own name point to this machine, and its requests would count as its own then.
pub(crate) async fn check_host(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    if app.options.local_names_only {
        let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
        if !host.is_some_and(is_local) {
            let message = "this server answers requests for localhost, 127.0.0.1 and [::1] only: the header Host names \
                           another machine. Start it with --api-key to serve other names";
            return ApiError::status(StatusCode::FORBIDDEN, message).into_response();
        }
    }
    next.run(request).await
}

/// Refuses a body by its length before it comes.
pub(crate) async fn check_length(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let length = request.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok());
    // (What is no number has been refused already.)
    let length = length.and_then(|length| length.parse::<u64>().ok()).unwrap_or(0);
    if length > app.options.body_bytes as u64 {
        return too_large().into_response();
    }
    next.run(request).await
}

fn is_local(host: &str) -> bool {
    let Ok(authority) = host.parse::<axum::http::uri::Authority>() else { return false };
    let name = authority.host();
    let address = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost")
        || address.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// What tells browsers that pages of these origins may use the API; `None` for none.
pub(crate) fn cors(origins: &[String]) -> Result<Option<CorsLayer>, String> {
    if origins.is_empty() {
        return Ok(None);
    }
    let allowed = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::from(Any)
    } else {
        let parse = |origin: &String| -> Result<HeaderValue, String> {
            let valid = (origin.starts_with("http://") || origin.starts_with("https://"))
                && !origin[8.min(origin.len())..].trim_start_matches('/').contains('/');
            let value = HeaderValue::from_str(origin).ok().filter(|_| valid);
            value.ok_or_else(|| format!("{origin:?} is no origin; an origin is like https://example.org"))
        };
        AllowOrigin::list(origins.iter().map(parse).collect::<Result<Vec<_>, _>>()?)
    };
    // Clients send headers of their own, such as OpenAI's `x-stainless-lang`.
    let layer = CorsLayer::new().allow_origin(allowed).allow_headers(AllowHeaders::mirror_request());
    Ok(Some(layer.allow_methods([Method::GET, Method::POST])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_compared_whole() {
        let key = Key::new("secret");
        assert!(key.is(b"secret"));
        for other in [&b""[..], b"secre", b"secret ", b"Secret", b"\xff"] {
            assert!(!key.is(other));
        }
    }

    #[test]
    fn local_names() {
        for local in ["localhost", "LOCALHOST:80", "127.0.0.1:8080", "127.1.2.3", "[::1]", "[::1]:8080"] {
            assert!(is_local(local), "{local}");
        }
        for other in
            ["", "example.org", "localhost.example.org", "10.0.0.1", "[::2]:80", "127.0.0.1.nip.io", "a b"]
        {
            assert!(!is_local(other), "{other}");
        }
    }

    #[test]
    fn origins_are_checked() {
        assert!(cors(&[]).unwrap().is_none());
        assert!(cors(&["https://example.org".into(), "http://localhost:3000".into()]).unwrap().is_some());
        assert!(cors(&["*".into()]).unwrap().is_some());
        for wrong in ["example.org", "https://example.org/page", "", "https://a\n"] {
            assert!(cors(&[wrong.to_owned()]).is_err(), "{wrong}");
        }
    }
}
