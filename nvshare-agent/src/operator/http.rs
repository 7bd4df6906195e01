//! HTTP: `/metrics`, `/healthz` and a status page.

use std::{convert::Infallible, fmt::Write as _, sync::Arc, time::Duration};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::CONTENT_TYPE,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, sync::Semaphore, time::timeout};
use tokio_util::sync::CancellationToken;

use super::{inventory, protocol::StatusReport, report::Desk};

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
        "/gpus.json" => match inventory::take(desk).await {
            Ok(inventory) => {
                let body = serde_json::to_string(&inventory).unwrap_or_else(|error| error.to_string());
                text(StatusCode::OK, "application/json", body)
            }
            Err(gone) => text(StatusCode::SERVICE_UNAVAILABLE, "text/plain", format!("{gone}\n")),
        },
        "/" => match desk.status().await {
            Ok(status) => text(StatusCode::OK, "text/html; charset=utf-8", page(&status)),
            Err(gone) => text(StatusCode::SERVICE_UNAVAILABLE, "text/plain", format!("{gone}\n")),
        },
        other => text(
            StatusCode::NOT_FOUND,
            "text/plain",
            format!("nothing at {other}; there are /metrics, /healthz, /gpus.json and /\n"),
        ),
    }
}

async fn metrics(desk: &Desk) -> Response<Full<Bytes>> {
    let rendered = match desk.hub.driver.seen().await {
        Ok(seen) => {
            desk.hub.metrics.render(&seen.view, &desk.sensors.all()).map_err(|error| error.to_string())
        }
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
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}

fn escape(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut escaped, c| {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
        escaped
    })
}

/// The status as a page without scripts or foreign content.
fn page(status: &StatusReport) -> String {
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    let mut html = String::from(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta http-equiv=\"refresh\" content=\"2\">\
         <title>nvshare</title><style>body{font:15px system-ui;margin:2rem;max-width:60rem}table{border-collapse:\
         collapse;width:100%}th,td{text-align:left;padding:.25rem .75rem .25rem 0;border-bottom:1px solid #ccc}\
         </style><h1>nvshare</h1>",
    );
    // Writing to a String does not fail.
    for gpu in &status.gpus {
        let _ = write!(
            html,
            "<h2>{}</h2><p>{}: <b>{}</b>{}. {} managed of {}.</p>\
             <table><tr><th>client<th>program<th>pid<th>state<th>managed<th>had the GPU<th>waited</tr>",
            escape(gpu.name.as_deref().unwrap_or("GPU")),
            gpu.gpu,
            gpu.mode,
            gpu.reason.as_deref().map(|reason| format!(" ({})", escape(reason))).unwrap_or_default(),
            mib(gpu.committed_bytes),
            gpu.capacity_bytes.map_or_else(|| "an unknown amount".to_owned(), mib),
        );
        for client in &gpu.clients {
            let _ = write!(
                html,
                "<tr><td>{}<td>{}<td>{}<td>{}<td>{}<td>{:.1} s<td>{:.1} s</tr>",
                client.client,
                escape(&client.name),
                client.pid,
                client.state,
                mib(client.managed_bytes),
                client.granted_s,
                client.waited_s
            );
        }
        html.push_str("</table>");
    }
    html.push_str("<h2>Sensors</h2><table>");
    for sensor in &status.sensors {
        let (state, detail) = match &sensor.state {
            crate::observe::source::SensorState::Attached(detail) => ("attached", detail),
            crate::observe::source::SensorState::Unavailable(reason) => ("unavailable", reason),
        };
        let _ = write!(html, "<tr><td>{}<td>{state}<td>{}</tr>", sensor.sensor, escape(detail));
    }
    html.push_str("</table></html>");
    html
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_programs_name_cannot_inject_markup() {
        assert_eq!(escape("<script>'&\""), "&lt;script&gt;&#39;&amp;&quot;");
    }
}
