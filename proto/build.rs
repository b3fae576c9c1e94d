//! Generates the wire types with protox, so that no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["proto/baton.proto", "proto/admin.proto"], ["proto"])?;
    let codec = "crate::codec::SmallCodec";
    tonic_prost_build::configure().build_transport(false).codec_path(codec).bytes(".").compile_fds(files)?;
    Ok(())
}
