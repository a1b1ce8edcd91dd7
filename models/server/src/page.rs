//! The chat page, from the binary.

use axum::http::{HeaderValue, Uri, header};
use axum::response::{IntoResponse, Response};

use crate::ApiError;
use crate::serve::unknown_path;

/// Scripts, styles and connections of this server alone.
const POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
);

fn file(kind: &'static str, text: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static(kind)),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        // Another version of the program has another page.
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    (headers, text).into_response()
}

/// `GET /`.
pub(crate) async fn index() -> Response {
    file("text/html; charset=utf-8", include_str!("../page/index.html"))
}

/// The files beside it, by name.
const FILES: [(&str, &str); 13] = [
    ("style.css", include_str!("../page/style.css")),
    ("actions.js", include_str!("../page/actions.js")),
    ("app.js", include_str!("../page/app.js")),
    ("dialogs.js", include_str!("../page/dialogs.js")),
    ("dom.js", include_str!("../page/dom.js")),
    ("handlers.js", include_str!("../page/handlers.js")),
    ("list.js", include_str!("../page/list.js")),
    ("markdown.js", include_str!("../page/markdown.js")),
    ("requests.js", include_str!("../page/requests.js")),
    ("run.js", include_str!("../page/run.js")),
    ("state.js", include_str!("../page/state.js")),
    ("store.js", include_str!("../page/store.js")),
    ("view.js", include_str!("../page/view.js")),
];

/// `GET /page/{name}`.
pub(crate) async fn beside(uri: Uri) -> Result<Response, ApiError> {
    let name = uri.path().rsplit('/').next().unwrap_or_default();
    match FILES.iter().find(|(known, _)| *known == name) {
        Some((name, text)) if name.ends_with(".js") => Ok(file("text/javascript; charset=utf-8", text)),
        Some((_, text)) => Ok(file("text/css; charset=utf-8", text)),
        None => Err(unknown_path(uri).await),
    }
}
