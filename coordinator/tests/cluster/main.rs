//! Coordinators over real TCP and real files, driven as gateways and workers drive them.

mod admin;
mod deposed;
mod gateways;
mod group;
mod health;
mod load;
mod membership;
mod one;
mod storage;
mod stream;
mod three;

use std::time::Duration;

/// Polls until the answer is there; a condition that never comes is a failure with its name.
async fn wait_for<T, F: Future<Output = Option<T>>>(what: &str, mut check: impl FnMut() -> F) -> T {
    let polled = async {
        loop {
            if let Some(answer) = check().await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), polled).await.unwrap_or_else(|_| panic!("never came: {what}"))
}
