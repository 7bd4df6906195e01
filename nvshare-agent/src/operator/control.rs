//! The control socket: requests of operators, one JSON object per line.

use std::{sync::Arc, time::Duration};

use serde::Serialize;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream, unix::OwnedWriteHalf},
    sync::{Semaphore, broadcast::error::RecvError},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    orders::{Wanted, carry_out},
    protocol::{Answer, REQUEST_MAX, Request},
    report::Desk,
};
use crate::driver::{Gone, PlanEvent, Tapped};

/// Operators served at one time.
const OPERATORS: usize = 64;
/// An operator must send its request, and take its answer, within this time.
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves operators until cancelled.
pub async fn serve(listener: UnixListener, desk: Arc<Desk>, shutdown: CancellationToken) {
    let operators = TaskTracker::new();
    let places = Arc::new(Semaphore::new(OPERATORS));
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                    // Without a place there is no answer; the connection closes.
                    continue;
                };
                let (desk, shutdown) = (Arc::clone(&desk), shutdown.clone());
                operators.spawn(async move {
                    tokio::select! {
                        () = shutdown.cancelled() => {}
                        result = converse(stream, &desk) => if let Err(error) = result {
                            tracing::debug!(%error, "an operator's connection ended");
                        },
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept an operator; trying again");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    operators.close();
    operators.wait().await;
}

/// Answers requests of one connection.
async fn converse(stream: UnixStream, desk: &Desk) -> std::io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    loop {
        let mut line = Vec::new();
        let mut limited = (&mut read).take(REQUEST_MAX as u64);
        match timeout(PATIENCE, limited.read_until(b'\n', &mut line)).await {
            Ok(Ok(0)) => return Ok(()),
            Ok(read) => read?,
            Err(_elapsed) => return say(desk, &mut write, Err("no request within 10 s".to_owned())).await,
        };
        if line.len() >= REQUEST_MAX {
            return say(desk, &mut write, Err(format!("the request is longer than {REQUEST_MAX} bytes")))
                .await;
        }
        let request = String::from_utf8(line)
            .map_err(|_invalid| "the request is not UTF-8".to_owned())
            .and_then(|line| Request::parse(line.trim_end()));
        match request {
            Ok(Request::Events { since_ms }) => return follow(desk, &mut write, since_ms).await,
            Ok(Request::Record {}) => return record(desk, &mut write).await,
            Ok(request) => {
                let answer = answer(desk, request).await;
                say(desk, &mut write, answer).await?;
            }
            Err(error) => say(desk, &mut write, Err(error)).await?,
        }
    }
}

async fn answer(desk: &Desk, request: Request) -> Result<Value, String> {
    if let Some(wanted) = Wanted::of(&request)? {
        return json(Ok(carry_out(desk, wanted).await?));
    }
    match request {
        Request::Status {} => json(desk.status().await),
        Request::Explain {} => json(desk.explain().await),
        Request::Clients {} => json(Ok(desk.clients())),
        Request::Doctor {} => json(Ok(desk.doctor())),
        Request::Settings {} => json(Ok(desk.settings())),
        Request::Overview {} => json(desk.overview().await),
        // Carried out above.
        Request::SetMode { .. }
        | Request::SetQuantum { .. }
        | Request::SetQuantumMax { .. }
        | Request::SetOverhead { .. }
        | Request::SetWeight { .. }
        | Request::SetPriority { .. }
        | Request::SetLimit { .. }
        // Taken by `converse`, which answers them with a stream.
        | Request::Record {}
        | Request::Events { .. } => Err("this request has no answer of one line".to_owned()),
    }
}

fn json<T: Serialize>(result: Result<T, Gone>) -> Result<Value, String> {
    let value = result.map_err(|gone| gone.to_string())?;
    serde_json::to_value(value).map_err(|error| format!("the answer has no JSON form: {error}"))
}

/// Sends changes of plan until the operator goes away.
async fn follow(desk: &Desk, write: &mut OwnedWriteHalf, since_ms: Option<f64>) -> std::io::Result<()> {
    let mut events = desk.hub.driver.events();
    let past = match desk.hub.driver.seen().await {
        Ok(seen) => seen.changes,
        Err(gone) => return say(desk, write, Err(gone.to_string())).await,
    };
    tracing::debug!("an operator follows the plan");
    let mut last = f64::NEG_INFINITY;
    for event in past {
        last = last.max(event.t_ms);
        if since_ms.is_some_and(|since| event.t_ms >= since) {
            say_event(write, &event).await?;
        }
    }
    loop {
        match events.recv().await {
            // What was in the past already when this began to listen was told from there.
            Ok(event) if event.t_ms <= last => {}
            Ok(event) => say_event(write, &event).await?,
            Err(RecvError::Lagged(missed)) => {
                let error = format!("{missed} changes of plan were missed; connect again");
                return say(desk, write, Err(error)).await;
            }
            Err(RecvError::Closed) => return Ok(()),
        }
    }
}

/// Sends a recording until the operator goes away.
async fn record(desk: &Desk, write: &mut OwnedWriteHalf) -> std::io::Result<()> {
    let Tapped { head, mut lines } = match desk.hub.driver.record().await {
        Ok(tapped) => tapped,
        Err(gone) => return say(desk, write, Err(gone.to_string())).await,
    };
    tracing::info!("an operator records the engine");
    line(write, &Answer::Ok(serde_json::to_value(head)?)).await?;
    while let Some(recorded) = lines.recv().await {
        line(write, &Answer::Ok(serde_json::to_value(recorded)?)).await?;
    }
    let error = "the recording ends here: it was not taken fast enough, or the agent stops".to_owned();
    say(desk, write, Err(error)).await
}

async fn say_event(write: &mut OwnedWriteHalf, event: &PlanEvent) -> std::io::Result<()> {
    line(write, &Answer::Ok(serde_json::to_value(event)?)).await
}

async fn say(desk: &Desk, write: &mut OwnedWriteHalf, answer: Result<Value, String>) -> std::io::Result<()> {
    let outcome = if answer.is_ok() { "ok" } else { "error" };
    desk.hub.metrics.control_requests.with_label_values(&[outcome]).inc();
    line(write, &answer.map_or_else(Answer::Error, Answer::Ok)).await
}

async fn line(write: &mut OwnedWriteHalf, answer: &Answer) -> std::io::Result<()> {
    let mut text = serde_json::to_vec(answer)?;
    text.push(b'\n');
    timeout(PATIENCE, write.write_all(&text))
        .await
        .map_err(|_elapsed| std::io::Error::other("the operator does not read"))?
}
