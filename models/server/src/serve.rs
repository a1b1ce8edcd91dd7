//! The HTTP server: routes, limits, and an end that lets answers finish.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{Request, StatusCode};
use axum::middleware;
use axum::routing::{get, post};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;
use tower::ServiceExt as _;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::timeout::RequestBodyTimeoutLayer;

use crate::connection::Client;
use crate::metrics::Metrics;
use crate::models::Models;
use crate::receipts::Receipts;
use crate::security::{self, Key};
use crate::{ApiError, chat, completions, embeddings, health, page, receipts, text};

/// What clients may do, and how long.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Clients must send this key as `Authorization: Bearer KEY`. `None`: anybody may ask.
    pub api_key: Option<String>,
    /// Only requests whose `Host` names this machine are answered, so that a web page elsewhere can't reach the server by
    /// a name of its own. For a server without a key that listens on this machine alone.
    pub local_names_only: bool,
    /// The origins of web pages that may use the API, besides the server's own page. `*`: all.
    pub cors: Vec<String>,
    /// Bytes of a request's body at most.
    pub body_bytes: usize,
    /// Tokens of an answer at most, whatever is asked for.
    pub max_tokens: usize,
    /// Connections at once; further ones wait to be accepted.
    pub connections: usize,
    /// Time to send a request's head, and time between two pieces of its body.
    pub receive_time: Duration,
    /// Time in which a client must take a part of what is sent to it.
    pub send_time: Duration,
    /// Time for an answer, from its request on.
    pub request_time: Duration,
    /// Time that answers have to finish when the server is told to stop.
    pub stop_time: Duration,
}

impl Default for ServerOptions {
    /// No key, local names only, no other origins, 4 MiB, as many tokens as the context holds, 512 connections, 10 s, 30 s,
    /// ten minutes, 10 s.
    fn default() -> Self {
        Self {
            api_key: None,
            local_names_only: true,
            cors: Vec::new(),
            body_bytes: 4 << 20,
            max_tokens: usize::MAX,
            connections: 512,
            receive_time: Duration::from_secs(10),
            send_time: Duration::from_secs(30),
            request_time: Duration::from_secs(600),
            stop_time: Duration::from_secs(10),
        }
    }
}

/// What all requests share.
pub(crate) struct App {
    pub models: Arc<Models>,
    pub options: ServerOptions,
    pub key: Option<Key>,
    pub metrics: Metrics,
    pub receipts: Receipts,
    /// Of work that takes a thread for long.
    pub turns: Arc<Semaphore>,
    pub started: u64,
}

/// Texts that are cut into tokens, receipts that are made and batches that are embedded at once.
const TURNS: usize = 4;

/// How often idle models are looked for.
const IDLE_CHECK: Duration = Duration::from_secs(5);

/// Answers requests on `listener` until `stop` is ready. Then no new connection is accepted, and open answers have
/// [`stop_time`](ServerOptions::stop_time) to finish.
///
/// # Errors
/// If an origin in the options is not one.
pub async fn serve(
    listener: TcpListener,
    models: Arc<Models>,
    options: ServerOptions,
    stop: impl Future<Output = ()>,
) -> Result<(), String> {
    let cors = security::cors(&options.cors)?;
    let app = Arc::new(App {
        key: options.api_key.as_deref().map(Key::new),
        metrics: Metrics::new(),
        receipts: Receipts::default(),
        turns: Arc::new(Semaphore::new(TURNS)),
        started: crate::answer::unix_time(),
        models,
        options,
    });
    let router = router(app.clone(), cors);
    let places = Arc::new(Semaphore::new(app.options.connections.clamp(1, Semaphore::MAX_PERMITS)));
    let graceful = GracefulShutdown::new();
    let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(app.options.receive_time);
    let mut idle = tokio::time::interval(IDLE_CHECK);
    tokio::pin!(stop);
    loop {
        // A place first: what can't be served waits in the system's queue.
        let place = tokio::select! {
            place = places.clone().acquire_owned() => place,
            () = &mut stop => break,
        };
        let Ok(place) = place else { break };
        let stream = loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => break Some(stream),
                    Err(error) => {
                        // Such as too many open files: others may be closed soon.
                        tracing::warn!("a connection can't be accepted: {error}");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
                _ = idle.tick() => app.models.unload_idle(),
                () = &mut stop => break None,
            }
        };
        let Some(stream) = stream else { break };
        // Tokens are sent as they come.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!("{error}");
        }
        let (client, stream) = Client::of(stream);
        let service = TowerToHyperService::new(router.clone().map_request(move |mut request: Request<_>| {
            request.extensions_mut().insert(client.clone());
            request
        }));
        // A client that does not read loses its connection.
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(app.options.send_time));
        let connection = builder.serve_connection(TokioIo::new(Box::pin(stream)), service).into_owned();
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!("a connection ended: {error}");
            }
            drop(place);
        });
    }
    drop(listener);
    tokio::select! {
        () = graceful.shutdown() => {}
        () = tokio::time::sleep(app.options.stop_time) => tracing::warn!("some answers were not complete in time"),
    }
    Ok(())
}

fn router(app: Arc<App>, cors: Option<tower_http::cors::CorsLayer>) -> Router {
    let api = Router::new()
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/embeddings", post(embeddings::embeddings))
        .route("/v1/models", get(text::models))
        .route("/v1/models/{name}", get(text::model))
        .route("/v1/receipts/{id}", get(receipts::receipt))
        .route("/tokenize", post(text::tokenize))
        .route("/detokenize", post(text::detokenize))
        .route("/metrics", get(crate::metrics::metrics))
        .route_layer(middleware::from_fn_with_state(app.clone(), security::require_key));
    let router = Router::new()
        .merge(api)
        .route("/health", get(health::health))
        .route("/", get(page::index))
        .route("/page/{name}", get(page::beside))
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(app.options.body_bytes))
        .layer(middleware::from_fn_with_state(app.clone(), security::check_length))
        .layer(RequestBodyTimeoutLayer::new(app.options.receive_time))
        .layer(CatchPanicLayer::custom(|_: Box<dyn std::any::Any + Send>| {
            use axum::response::IntoResponse as _;
            tracing::error!("a request panicked: please report it");
            ApiError::internal("the server failed on this request; its log has the reason").into_response()
        }));
    // Outside of all else: a preflight has no key.
    let router = match cors {
        Some(cors) => router.layer(cors),
        None => router,
    };
    router.layer(middleware::from_fn_with_state(app.clone(), security::check_host)).with_state(app)
}

pub(crate) async fn unknown_path(uri: axum::http::Uri) -> ApiError {
    let path: String = uri.path().chars().take(100).collect();
    ApiError::not_found(
        "unknown_url",
        format!("there is nothing at {path:?}; docs/serving.md lists the endpoints"),
    )
}

async fn wrong_method(method: axum::http::Method) -> ApiError {
    let message = format!("{method} is not possible here; docs/serving.md lists the endpoints");
    ApiError::status(StatusCode::METHOD_NOT_ALLOWED, message)
}
