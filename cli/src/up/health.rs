//! Asks a gateway that has just started whether it serves.

use std::sync::Arc;
use std::time::Duration;

use baton_proto::TcpNet;
use tokio::time::Instant;

use crate::exit::Failure;
use crate::http::Client;

const POLL: Duration = Duration::from_millis(5);
const PATIENCE: Duration = Duration::from_secs(30);

/// Until the gateway is healthy and lists the model.
pub(crate) async fn wait(gateway: &str, model: &str) -> Result<(), Failure> {
    let client = Client::new(Arc::new(TcpNet), &format!("http://{gateway}"), None).map_err(Failure::refused)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = match serves(&client, model).await {
            Ok(true) => return Ok(()),
            Ok(false) => "it does not list the model yet".to_string(),
            Err(error) => error.to_string(),
        };
        if Instant::now() > deadline {
            let patience = PATIENCE.as_secs();
            return Err(anyhow::anyhow!(
                "every process is ready, but the gateway did not serve within {patience} s: {answer}"
            )
            .into());
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn serves(client: &Client, model: &str) -> Result<bool, crate::http::HttpError> {
    client.open("/health", None).await?;
    let list = client.json("/v1/models", None).await?;
    Ok(list["data"].as_array().into_iter().flatten().any(|entry| entry["id"] == *model))
}
