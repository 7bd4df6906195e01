//! HTTP: the status page, the same as JSON, `/metrics` and `/healthz`.

use std::{convert::Infallible, sync::Arc, time::Duration};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{
        CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, REFERRER_POLICY,
        X_CONTENT_TYPE_OPTIONS,
    },
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, sync::Semaphore, time::timeout};
use tokio_util::sync::CancellationToken;

use super::{inventory, overview::OverviewReport, page, report::Desk};

/// Connections served at one time; more wait.
const CONNECTIONS: usize = 64;
/// A connection may be open this long.
const PATIENCE: Duration = Duration::from_secs(30);
/// The engine answers within this time, or the agent is not healthy.
const HEALTHY: Duration = Duration::from_secs(2);

/// Serves until cancelled.
pub async fn serve(listener: TcpListener, desk: Arc<Desk>, shutdown: CancellationToken) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept an HTTP connection; trying again");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let (desk, shutdown) = (Arc::clone(&desk), shutdown.clone());
        tokio::spawn(async move {
            let service = service_fn(|request| {
                let desk = Arc::clone(&desk);
                async move { Ok::<_, Infallible>(respond(&request, &desk).await) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                () = shutdown.cancelled() => {}
                // A client that breaks off is no news.
                _ = timeout(PATIENCE, connection) => {}
            }
            drop(place);
        });
    }
}

async fn respond(request: &Request<Incoming>, desk: &Desk) -> Response<Full<Bytes>> {
    if request.method() != Method::GET {
        return text(StatusCode::METHOD_NOT_ALLOWED, "text/plain", "only GET is served here\n".to_owned());
    }
    match request.uri().path() {
        "/metrics" => metrics(desk).await,
        "/healthz" => match timeout(HEALTHY, desk.hub.driver.seen()).await {
            Ok(Ok(_)) => text(StatusCode::OK, "text/plain", "ok\n".to_owned()),
            Ok(Err(_)) | Err(_) => {
                text(StatusCode::SERVICE_UNAVAILABLE, "text/plain", "the engine does not answer\n".to_owned())
            }
        },
        "/" => picture(desk, "text/html; charset=utf-8", page::page).await,
        "/live" => picture(desk, "text/html; charset=utf-8", page::live).await,
        "/overview.json" => {
            picture(desk, "application/json", |overview| {
                serde_json::to_string(overview).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"))
                    + "\n"
            })
            .await
        }
        "/gpus.json" => match inventory::take(desk).await {
            Ok(inventory) => {
                let body = serde_json::to_string(&inventory).unwrap_or_else(|error| error.to_string());
                text(StatusCode::OK, "application/json", body)
            }
            Err(gone) => text(StatusCode::SERVICE_UNAVAILABLE, "text/plain", format!("{gone}\n")),
        },
        other => text(
            StatusCode::NOT_FOUND,
            "text/plain",
            format!("nothing at {other}; there are /, /overview.json, /metrics, /gpus.json and /healthz\n"),
        ),
    }
}

/// The present, drawn.
async fn picture(
    desk: &Desk,
    kind: &'static str,
    draw: impl Fn(&OverviewReport) -> String,
) -> Response<Full<Bytes>> {
    match desk.overview().await {
        Ok(overview) => text(StatusCode::OK, kind, draw(&overview)),
        Err(gone) => text(StatusCode::SERVICE_UNAVAILABLE, "text/plain", format!("{gone}\n")),
    }
}

async fn metrics(desk: &Desk) -> Response<Full<Bytes>> {
    let rendered = match desk.hub.driver.seen().await {
        Ok(seen) => desk.metrics(&seen).map_err(|error| error.to_string()),
        Err(gone) => Err(gone.to_string()),
    };
    match rendered {
        Ok(metrics) => text(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", metrics),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", format!("{error}\n")),
    }
}

fn text(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    if kind.starts_with("text/html") {
        headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(page::policy()));
    }
    response
}
