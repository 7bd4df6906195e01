//! Where the plugin hears which GPUs there are: the agent's HTTP listener, or a file of the same form.

use std::{convert::Infallible, fmt, path::PathBuf, str::FromStr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Request, StatusCode, Uri, body::Bytes, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use nvshare_core::Inventory;
use tokio::{net::TcpStream, time::timeout};

/// The agent answers within this time, or counts as silent.
const PATIENCE: Duration = Duration::from_secs(2);
/// No list is longer.
const LONGEST: usize = 1 << 20;

/// Where the list comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The agent, at this `http://` address.
    Agent(Uri),
    /// A file.
    File(PathBuf),
}

/// An address that is not reached by plain HTTP.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is neither an address like http://127.0.0.1:9464/gpus.json nor the path of a file")]
pub struct InvalidSource(String);

impl FromStr for Source {
    type Err = InvalidSource;

    fn from_str(text: &str) -> Result<Self, InvalidSource> {
        if !text.contains("://") {
            return text.parse::<PathBuf>().map(Self::File).map_err(|never: Infallible| match never {});
        }
        match text.parse::<Uri>() {
            Ok(uri) if uri.scheme_str() == Some("http") && uri.host().is_some() => Ok(Self::Agent(uri)),
            Ok(_) | Err(_) => Err(InvalidSource(text.to_owned())),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Agent(uri) => uri.fmt(f),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

impl Source {
    /// The list as it is now.
    pub async fn read(&self) -> Result<Inventory> {
        let text = match self {
            Self::File(path) => Bytes::from(tokio::fs::read(path).await?),
            Self::Agent(uri) => timeout(PATIENCE, get(uri)).await.context("no answer within 2 s")??,
        };
        serde_json::from_slice(&text).context("the answer is not a list of GPUs")
    }
}

async fn get(uri: &Uri) -> Result<Bytes> {
    let host = uri.host().context("no host")?;
    let stream = TcpStream::connect((host.trim_matches(['[', ']']), uri.port_u16().unwrap_or(80))).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let authority = uri.authority().context("no host")?.as_str();
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let request = Request::get(path).header(HOST, authority).body(Empty::<Bytes>::new())?;
    let answer = async move {
        let response = sender.send_request(request).await?;
        let status = response.status();
        ensure!(status == StatusCode::OK, "the agent answered {status}; is it as new as this plugin?");
        let body = Limited::new(response.into_body(), LONGEST).collect().await;
        Ok(body.map_err(|error| anyhow::anyhow!("the answer broke off: {error}"))?.to_bytes())
    };
    tokio::pin!(connection);
    tokio::pin!(answer);
    // The connection only moves while it is polled.
    tokio::select! {
        answer = &mut answer => answer,
        ended = &mut connection => {
            ended?;
            answer.await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_or_a_path_is_a_source_and_nothing_else_is() {
        assert!(matches!("http://[::1]:9464/gpus.json".parse(), Ok(Source::Agent(_))));
        assert!(matches!("/etc/nvshare/gpus.json".parse(), Ok(Source::File(_))));
        for text in ["https://node/gpus.json", "file:///x", "http://"] {
            assert!(text.parse::<Source>().is_err(), "{text}");
        }
    }
}
