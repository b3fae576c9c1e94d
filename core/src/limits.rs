//! Every bound of the system that is not a flag, in one place.

/// Token positions in a KV block.
pub const BLOCK_TOKENS: usize = 16;

/// Body of an HTTP request.
pub const HTTP_BODY_BYTES_MAX: usize = 8 << 20;
/// What is read of a body over that limit, so that its client hears the refusal.
pub const HTTP_DISCARD_BYTES_MAX: usize = 64 << 20;
/// A gRPC message; a model card carries the tokenizer.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// Requests one gateway works on at a time; more are refused with 429.
pub const GATEWAY_REQUESTS_MAX: usize = 4096;
/// Bytes of events a slow client may leave unread before its request is cancelled.
pub const STREAM_BUFFER_EVENTS_MAX: usize = 4096;

pub const CHOICES_MAX: u32 = 16;
pub const TOP_LOGPROBS_MAX: u32 = 20;
pub const STOP_STRINGS_MAX: usize = 16;
pub const STOP_STRING_BYTES_MAX: usize = 256;
pub const STOP_TOKENS_MAX: usize = 64;
pub const LOGIT_BIAS_MAX: usize = 1024;

/// Assignments one request may take before it ends in an error.
pub const ATTEMPTS_MAX: u32 = 8;
pub const REQUEST_DEADLINE_MS: u64 = 600_000;
/// How long a request waits for a worker to come back before 503.
pub const NO_WORKERS_WAIT_MS: u64 = 5_000;

pub const HEARTBEAT_MS: u64 = 250;
/// A worker that has not been heard of for so long is fenced.
pub const WORKER_LEASE_MS: u64 = 1_500;
/// How long workers keep serving what they hold while no coordinator answers.
pub const AUTONOMY_GRACE_MS: u64 = 30_000;
/// How long a worker that drains lets its requests go on before they move to others.
pub const DRAIN_MS: u64 = 30_000;
/// Coordinators a worker sends heartbeats to.
pub const COORDINATORS_MAX: usize = 16;
/// An engine whose step takes so long, and three times as long as nearly all before it, is stuck.
pub const STEP_STUCK_MS: u64 = 1_000;
pub const RPC_TIMEOUT_MS: u64 = 2_000;
/// How long a request of the interactive lane may wait for room with the coordinator.
pub const QUEUE_INTERACTIVE_MS: u64 = 2_000;
/// The same for the batch lane.
pub const QUEUE_BATCH_MS: u64 = 30_000;
/// Requests that may wait so in each lane.
pub const QUEUE_REQUESTS_MAX: usize = 4096;
/// How long a request may outlive its gateway at most.
pub const RESUMABLE_MS_MAX: u64 = 300_000;

/// Longest silence on a handoff before it is aborted.
pub const HANDOFF_IDLE_MS: u64 = 1_000;
/// A link that has nothing to say says so this often.
pub const HANDOFF_PING_MS: u64 = 250;
/// Connecting and greeting on a link.
pub const HANDOFF_CONNECT_MS: u64 = 1_000;
/// Pause before a link connects again: the first, doubled up to the longest.
pub const HANDOFF_BACKOFF_MS: u64 = 20;
pub const HANDOFF_BACKOFF_MS_MAX: u64 = 1_000;
/// Failed connections in a row after which a link waits until it is asked for again.
pub const HANDOFF_CONNECTS_MAX: u32 = 16;
/// How long an aborted transfer's blocks wait for the writer's last word before its link is closed.
pub const HANDOFF_QUIESCE_MS: u64 = 500;
/// Key and value bytes in one frame at most, so one layer of one block fits in it.
pub const HANDOFF_FRAME_BYTES_MAX: usize = 1 << 20;
/// Bytes a link's sender may have unacknowledged.
pub const HANDOFF_CREDIT_BYTES: usize = 64 << 20;
/// A receiver acknowledges at least this often.
pub const HANDOFF_ACK_BYTES: usize = 1 << 20;
/// Times a receiver asks for damaged extents of one transfer again before it gives the transfer up.
pub const HANDOFF_RESENDS_MAX: u32 = 8;
/// Connections that one link over the network has: a sender's cores write them, and a network's paths carry them, side by side.
pub const HANDOFF_LANES: usize = 2;
/// The same at most.
pub const HANDOFF_LANES_MAX: usize = 4;
/// Connections one receiver serves.
pub const HANDOFF_LINKS_MAX: usize = 1024;
/// How long a worker waits for blocks that another one holds before it computes them.
pub const PULL_MS: u64 = 2_000;
/// Pulls that one worker serves at a time.
pub const LENDS_MAX: usize = 16;
/// How long a worker that drains waits for whoever goes on with a request to fetch its blocks.
pub const LINGER_MS: u64 = 2_000;
/// Bytes a worker's disk tier takes unless told otherwise.
pub const KV_DISK_BYTES: u64 = 8 << 30;
/// Of so many blocks that are used again one is audited, unless told otherwise: on average a few microseconds a block.
pub const KV_AUDIT: u32 = 64;
/// Requests waiting in one worker's queue.
pub const WORKER_QUEUE_MAX: usize = 256;

const _: () = assert!(WORKER_LEASE_MS > 3 * HEARTBEAT_MS);
const _: () = assert!(LINGER_MS <= PULL_MS);
const _: () = assert!(HANDOFF_LANES <= HANDOFF_LANES_MAX);
const _: () = assert!(HANDOFF_IDLE_MS > 3 * HANDOFF_PING_MS);
const _: () = assert!(HANDOFF_CREDIT_BYTES > 2 * (HANDOFF_ACK_BYTES + HANDOFF_FRAME_BYTES_MAX));
const _: () = assert!(QUEUE_INTERACTIVE_MS < QUEUE_BATCH_MS && QUEUE_BATCH_MS < REQUEST_DEADLINE_MS);
const _: () = assert!(AUTONOMY_GRACE_MS > WORKER_LEASE_MS);
const _: () = assert!(REQUEST_DEADLINE_MS > NO_WORKERS_WAIT_MS);
const _: () = assert!(HTTP_BODY_BYTES_MAX < MESSAGE_BYTES_MAX);
