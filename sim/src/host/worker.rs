//! A worker's host: one life after another, as the process of production does it.

use baton_core::{Env, Rng, Role, WorkerId};
use baton_worker::{Config, Ending, Left, Running, StartError};
use tokio::time::Duration;

use super::World;
use crate::model::{Pace, loaded};
use crate::topology::{KV_PORT, WORKER_PORT};

/// How long a drained worker lets its requests go on.
const DRAIN: Duration = Duration::from_millis(1_000);

/// One process.
pub async fn run(world: World, host: String, mut role: Role) -> turmoil::Result {
    let mut env = world.env(&host);
    let pace = Pace::new(world.topology.step, world.topology.row);
    world.seen().paces.insert(host.clone(), pace.clone());
    let mut config = config(&world, &host, role);
    let other = world.seen().upgraded.contains(&host);
    let mut model = loaded(pace.clone(), other);
    loop {
        let (net, clock, process) = (env.net.clone(), env.clock.clone(), env.process);
        let life = Env { net, clock, rng: Rng::new(env.rng.u64()), process };
        let running = match start(role, config.clone(), model, life).await {
            Ok(running) => running,
            Err(error) => return world.exit(&host, format!("did not start: {error}")).await,
        };
        let incarnation = running.shell().incarnation;
        world.record.note(&host, format!("serves as {} worker, incarnation {incarnation}", role.as_str()));
        world.seen().roles.insert(host.clone(), role);
        world.seen().workers.insert(host.clone(), running.shell().clone());
        let ended = until_its_end(&world, &host, running).await;
        world.seen().roles.remove(&host);
        world.seen().workers.remove(&host);
        match ended {
            Ok((Ending::Drained, _)) => {
                world.seen().drained.insert(host.clone());
                return world.exit(&host, "drained".to_string()).await;
            }
            Ok((ending, left)) => {
                let mut kept = left.model;
                if let Ending::Becomes(wanted) = ending {
                    (role, config.role) = (wanted, wanted);
                    // Of two versions only prefill workers have the other one: the reference knows one.
                    if other && wanted == Role::Decode {
                        kept = loaded(pace.clone(), false);
                    }
                }
                let others = config.coordinators.iter().filter(|a| !left.coordinators.contains(a)).cloned();
                config.coordinators = left.coordinators.iter().cloned().chain(others).collect();
                (config.cluster, model) = (left.cluster, kept);
            }
            Err(error) => return world.exit(&host, error).await,
        }
    }
}

async fn until_its_end(world: &World, host: &str, mut running: Running) -> Result<(Ending, Left), String> {
    let ending = running.ending().await.map_err(|error| error.to_string())?;
    world.record.note(host, format!("this life ends: {}", ending.as_str()));
    let shell = running.shell().clone();
    let left = running.end(ending).await.map_err(|error| error.to_string())?;
    let held = shell.engine.cache().stats();
    if matches!(ending, Ending::Drained | Ending::Becomes(_)) && held.used > 0 {
        world.seen().held_at_end.push((host.to_string(), held.used));
    }
    Ok((ending, left))
}

async fn start(role: Role, config: Config, model: baton_worker::LoadedModel, env: Env) -> Result<Running, StartError> {
    match role {
        Role::Prefill => baton_prefill_worker::start(config, model, env).await,
        _ => baton_decode_worker::start(config, model, env).await,
    }
}

fn config(world: &World, host: &str, role: Role) -> Config {
    Config {
        id: WorkerId(host.into()),
        role,
        listen: format!("0.0.0.0:{WORKER_PORT}"),
        kv_listen: format!("0.0.0.0:{KV_PORT}"),
        kv_advertise: None,
        cluster: String::new(),
        kv_tickets_required: false,
        kv_link: baton_worker::KvLink::Best,
        kv_tls: None,
        advertise_host: host.to_string(),
        coordinators: world.topology.coordinator_addresses(),
        drain_ms: DRAIN.as_millis() as u64,
        autonomy_ms: baton_core::limits::AUTONOMY_GRACE_MS,
        kv_pull: true,
        kv_block_tokens: None,
        kv_audit: baton_core::limits::KV_AUDIT,
        kv_host_bytes: 0,
        kv_disk: None,
        kv_disk_bytes: 0,
        engine: world.topology.engine,
    }
}
