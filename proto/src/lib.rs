//! The wire: generated types, their conversion to core's, and clients and servers over `core::Net`.
#![forbid(unsafe_code)]

pub mod beats;
pub mod channel;
pub mod codec;
pub mod convert;
pub mod server;
pub mod tcp;

/// Generated from `proto/baton.proto` and `proto/admin.proto`.
#[allow(clippy::all, unreachable_pub)]
pub mod v1 {
    tonic::include_proto!("baton.v1");
}

pub use beats::Beats;
pub use channel::channel;
pub use convert::BadMessage;
pub use tcp::TcpNet;

/// Grows with every change that an older peer could misunderstand. A peer of another version is refused at registration.
pub const WIRE_VERSION: u32 = 2;
